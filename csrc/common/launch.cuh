// Programmatic dependent launch: a kernel's start overlaps the end of the one before it.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "common/device.h"

namespace abiding {

// From here on the next kernel's blocks may take what room there is; they wait for this grid's end before they read.
// Its best place is found by measuring: right after the wait in the prologue, near the end in kernels that wait for peers.
__device__ __forceinline__ void pdl_launch_dependents() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}

// Keeps the compiler from computing an address again, in parts.
template <class Pointer>
__device__ __forceinline__ void opaque(Pointer& address) {
  asm volatile("" : "+l"(address));
  if constexpr (std::is_pointer_v<Pointer>) __builtin_assume(__isGlobal(address));
}

// Nothing that an earlier kernel wrote may be read, and nothing it reads written, before this returns. Meanwhile addresses can be
// computed that need parameters alone: those named here, which the compiler would otherwise leave for later.
template <class... Pointers>
__device__ __forceinline__ void pdl_wait(Pointers&... addresses) {
#if __CUDA_ARCH__ >= 900
  const uintptr_t all = (reinterpret_cast<uintptr_t>(addresses) | ... | uintptr_t{0});  // never 1, as only we know
  asm volatile("{ .reg .pred p; setp.ne.u64 p, %0, 1; @p griddepcontrol.wait; }" ::"l"(all) : "memory");
  (opaque(addresses), ...);
#endif
}

// What a kernel is started with: blocks, threads of a block, bytes of dynamic shared memory, blocks of a cluster, and how many
// rows of so many blocks, of so many threads.
struct LaunchConfig {
  unsigned grid_x, block_x;
  size_t smem_bytes = 0;
  unsigned cluster_x = 1, grid_y = 1, block_y = 1;
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
