#include "common/cuda.h"

#include <cstdlib>
#include <cstring>

#include "mxfp8_moe/kernels.h"
#include "mxfp8_moe/operators.h"

namespace abiding::mxfp8_moe {
namespace {

// In order of preference.
const GroupedMmImpl* const kGroupedMmImpls[] = {&kGroupedMmSm90, &kGroupedMmPortable};

// ABIDING_PORTABLE=1 leaves the implementations of single architectures out, for comparisons.
bool portable_only() {
  const char* value = std::getenv("ABIDING_PORTABLE");
  return value && std::strcmp(value, "1") == 0;
}

}  // namespace

// Once per call: the first implementation that this device has and that supports all of the call's GEMMs.
template <class... Gemms>
const GroupedMmImpl& choose_grouped_mm(const char* op, const CudaScope&, const Gemms&... gemms) {
  int major = 0, minor = 0;
  STD_CUDA_CHECK(device_attribute(cudaDevAttrComputeCapabilityMajor, &major));
  STD_CUDA_CHECK(device_attribute(cudaDevAttrComputeCapabilityMinor, &minor));
  const int arch = portable_only() ? 0 : 10 * major + minor;
  for (const GroupedMmImpl* impl : kGroupedMmImpls)
    if ((impl->arch == 0 || impl->arch == arch) && (impl->supports(gemms) && ...)) return *impl;
  fail(op, "no implementation for this device and these tensors; expected one that supports() them");
}
cudaError_t run_cuda(const GroupedMmParams& p, const GroupedMmImpl& impl, cudaStream_t stream) {
  return impl.run(p, stream);
}

ABIDING_KERNELS(abiding, CUDA, mxfp8_moe, m) { Operators<CudaScope>::implement(m); }

}  // namespace abiding::mxfp8_moe
