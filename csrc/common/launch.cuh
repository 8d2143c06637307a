// PDL (programmatic dependent launch): the start of a kernel overlaps the end of the upstream kernel.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "common/device.h"

namespace abiding {

// From here on, CTAs of the dependent kernel may take free SM resources; their pdl_wait still waits for this grid to
// end. The best place for it is found by measuring: right after the wait in the prologue, near the end in kernels that
// poll peers.
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

// Ordering: before this returns, a kernel may not read what the upstream kernel writes, nor write what it reads. The
// addresses given here depend on kernel parameters alone. They are computed before the wait, which hides their latency;
// the compiler would otherwise sink them below it.
template <class... Pointers>
__device__ __forceinline__ void pdl_wait(Pointers&... addresses) {
#if __CUDA_ARCH__ >= 900
  // Opaque predicate: always true at run time, because no address is 1, but it needs the addresses before the wait.
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
};

template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), const LaunchConfig& shape, cudaStream_t stream,
                   const Arguments&... arguments) {
  int major = 0;
  if (const cudaError_t status = device_attribute(cudaDevAttrComputeCapabilityMajor, &major); status != cudaSuccess)
    return status;
  cudaLaunchAttribute attributes[2] = {};
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
  return cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...);
}

}  // namespace abiding
