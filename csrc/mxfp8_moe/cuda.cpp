#include "common/cuda.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>

#include "mxfp8_moe/kernels.h"
#include "mxfp8_moe/operators.h"

namespace abiding::mxfp8_moe {
namespace {

// In order of preference.
const GroupedMmImpl* const kGroupedMmImpls[] = {&kGroupedMmSm90Fp8, &kGroupedMmSm90, &kGroupedMmPortable};

// The implementation that ABIDING_GROUPED_MM names, or null. It serves every call that it can serve at all: one for
// e4m3 rows leaves Compute::kExact to the others.
const GroupedMmImpl* pinned_grouped_mm(const char* op) {
  const char* name = std::getenv("ABIDING_GROUPED_MM");
  if (!name || !*name) return nullptr;
  std::string names;
  for (const GroupedMmImpl* impl : kGroupedMmImpls) {
    if (std::strcmp(impl->name, name) == 0) return impl;
    names += (names.empty() ? "" : " or ") + std::string(impl->name);
  }
  fail(op, "ABIDING_GROUPED_MM is ", name, "; expected ", names);
}

}  // namespace

// Once per call: the first implementation that this device has and that supports all of the call's GEMMs; or the one
// that is pinned.
template <class Gemms>
const GroupedMmImpl& choose_grouped_mm(const char* op, const CudaScope&, Compute compute, const Gemms& gemms) {
  int major = 0, minor = 0;
  STD_CUDA_CHECK(device_attribute(cudaDevAttrComputeCapabilityMajor, &major));
  STD_CUDA_CHECK(device_attribute(cudaDevAttrComputeCapabilityMinor, &minor));
  const int arch = 10 * major + minor;
  const auto can = [&](const GroupedMmImpl& impl) {
    return (impl.arch == 0 || impl.arch == arch) &&
           std::all_of(gemms.begin(), gemms.end(), [&](const GroupedMmParams* p) { return impl.supports(*p); });
  };
  const auto serves = [&](const GroupedMmImpl& impl) {
    return impl.row_format != RowFormat::kE4m3 || compute == Compute::kFp8;
  };
  if (const GroupedMmImpl* pinned = pinned_grouped_mm(op); pinned && serves(*pinned)) {
    check(can(*pinned), op, "ABIDING_GROUPED_MM is ", pinned->name,
          ", which does not support this device or these tensors; expected one that does, or none");
    return *pinned;
  }
  for (const GroupedMmImpl* impl : kGroupedMmImpls)
    if (serves(*impl) && can(*impl)) return *impl;
  fail(op, "no implementation for this device and these tensors; expected one that supports() them");
}
cudaError_t run_cuda(const GroupedMmParams& p, const GroupedMmImpl& impl, cudaStream_t stream) {
  return impl.run(p, stream);
}

ABIDING_KERNELS(abiding, CUDA, mxfp8_moe, m) { Operators<CudaScope>::implement(m); }

}  // namespace abiding::mxfp8_moe
