// PDL (programmatic dependent launch): the start of a kernel overlaps the end of the upstream kernel.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "common/device.h"

namespace abiding {

// From here on, CTAs of the dependent kernel may take free SM resources; their pdl_wait still waits for this grid to
// end. Where it may stand is a matter of correctness: see mxfp8_moe/layer.cu, and has_vector in all_reduce.cu. Among
// those places, measure: right after the wait in the prologue, near the end in kernels that poll peers.
__device__ __forceinline__ void pdl_launch_dependents() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}

// Hides how an address was computed, so that the compiler keeps it in registers and does not recompute parts of it.
template <class Pointer>
__device__ __forceinline__ void opaque(Pointer& address) {
  asm volatile("" : "+l"(address));
  if constexpr (std::is_pointer_v<Pointer>) __builtin_assume(__isGlobal(address));
}

// Ordering: before this returns, write nothing that an earlier kernel may read, and read nothing that one may still
// write. The PDL contract in mxfp8_moe/layer.cu lists what may be read early, and why. The addresses given here depend
// on kernel parameters alone. They are computed before the wait, which hides their latency; the compiler would
// otherwise sink them below it.
template <class... Pointers>
__device__ __forceinline__ void pdl_wait(Pointers&... addresses) {
#if __CUDA_ARCH__ >= 900
  // Opaque predicate: an address is never 1, which the compiler cannot know: so it computes the addresses first.
  const uintptr_t all = (reinterpret_cast<uintptr_t>(addresses) | ... | uintptr_t{0});
  asm volatile("{ .reg .pred p; setp.ne.u64 p, %0, 1; @p griddepcontrol.wait; }" ::"l"(all) : "memory");
  (opaque(addresses), ...);
#endif
}

struct LaunchConfig {
  unsigned grid_x, block_x;  // CTAs; threads per CTA
  size_t smem_bytes = 0;     // dynamic shared memory
  unsigned cluster_x = 1;    // CTAs per cluster
  unsigned grid_y = 1, block_y = 1;
  unsigned smem_carveout = 0;  // preferred share of L1 that is shared memory, in percent; 0: the driver's choice
};

// For kernels that run beside one that needs all shared memory of an SM. An SM changes its split of L1 and shared
// memory only while it is idle, which with PDL it is not. An SM with another split has room for fewer of that kernel's
// CTAs, as long as they run.
inline LaunchConfig with_max_smem(LaunchConfig config) {
  config.smem_carveout = 100;
  return config;
}

template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), const LaunchConfig& shape, cudaStream_t stream,
                   const Arguments&... arguments) {
  int major = 0;
  if (const cudaError_t status = device_attribute(cudaDevAttrComputeCapabilityMajor, &major); status != cudaSuccess)
    return status;
  cudaLaunchAttribute attributes[3] = {};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(shape.grid_x, shape.grid_y);
  config.blockDim = dim3(shape.block_x, shape.block_y);
  config.dynamicSmemBytes = shape.smem_bytes;
  config.stream = stream;
  config.attrs = attributes;
  if (major >= 9) {  // devices below compute capability 9.0 refuse this attribute
    attributes[config.numAttrs].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[config.numAttrs++].val.programmaticStreamSerializationAllowed = 1;
  }
  if (shape.cluster_x > 1) {
    attributes[config.numAttrs].id = cudaLaunchAttributeClusterDimension;
    attributes[config.numAttrs++].val.clusterDim = {shape.cluster_x, 1, 1};
  }
  if (shape.smem_carveout > 0) {
    attributes[config.numAttrs].id = cudaLaunchAttributePreferredSharedMemoryCarveout;
    attributes[config.numAttrs++].val.sharedMemCarveout = shape.smem_carveout;
  }
  return cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...);
}

}  // namespace abiding
