#include "common/cuda.h"

#include <cstdlib>
#include <cstring>

#include "mxfp8_moe/kernels.h"
#include "mxfp8_moe/operators.h"

namespace abiding::mxfp8_moe {
namespace {

// In order of preference.
const GroupedMmImpl* const kGroupedMmImpls[] = {&kGroupedMmSm90, &kGroupedMmPortable};

// ABIDING_PORTABLE=1 leaves the implementations of one architecture out, for comparisons.
bool portable_only() {
  const char* value = std::getenv("ABIDING_PORTABLE");
  return value && std::strcmp(value, "1") == 0;
}

}  // namespace

// Once per call: the first implementation that this device has and that supports all of the call's GEMMs.
template <class... Gemms>
const GroupedMmImpl& choose_grouped_mm(const CudaScope&, const Gemms&... gemms) {
  int arch_major = 0;
  STD_CUDA_CHECK(device_attribute(cudaDevAttrComputeCapabilityMajor, &arch_major));
  if (portable_only()) arch_major = 0;
  for (const GroupedMmImpl* impl : kGroupedMmImpls)
    if ((impl->arch_major == 0 || impl->arch_major == arch_major) && (impl->supports(gemms) && ...)) return *impl;
  fail("mxfp8_grouped_mm", "no implementation for this device and these tensors; expected one that supports() them");
}
cudaError_t run_cuda(const GroupedMmParams& p, const GroupedMmImpl& impl, cudaStream_t stream) {
  return impl.run(p, stream);
}

ABIDING_KERNELS(abiding, CUDA, mxfp8_moe, m) { Operators<CudaScope>::implement(m); }

}  // namespace abiding::mxfp8_moe
