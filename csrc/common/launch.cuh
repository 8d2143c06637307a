// Programmatic dependent launch: a kernel's start overlaps the end of the one before it.
#pragma once

#include <cuda_runtime.h>

namespace abiding {

// From here on the next kernel's blocks may take what room there is; they wait for this grid's end before they read.
// Its best place is found by measuring: right after the wait in the prologue, at the end in kernels that wait for peers.
__device__ __forceinline__ void launch_dependents() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}

// Nothing that an earlier kernel wrote may be read, and nothing it reads written, before this returns.
__device__ __forceinline__ void wait_for_earlier_grids() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// On devices below compute capability 9.0 the attribute is refused, so it is left out.
inline cudaError_t supports_dependent_launch(bool* supported) {
  int device = 0, major = 0;
  cudaError_t status = cudaGetDevice(&device);
  if (status == cudaSuccess) status = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  *supported = major >= 9;
  return status;
}

// What a kernel is started with: blocks, threads of a block, bytes of dynamic shared memory, blocks of a cluster.
struct Launch {
  unsigned grid, block;
  size_t shared = 0;
  unsigned cluster = 1;
};

template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), const Launch& how, cudaStream_t stream,
                   const Arguments&... arguments) {
  bool dependent = false;
  if (const cudaError_t status = supports_dependent_launch(&dependent); status != cudaSuccess) return status;
  cudaLaunchAttribute attributes[2] = {};
  cudaLaunchConfig_t config{};
  config.gridDim = how.grid;
  config.blockDim = how.block;
  config.dynamicSmemBytes = how.shared;
  config.stream = stream;
  config.attrs = attributes;
  if (dependent) {
    attributes[config.numAttrs].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[config.numAttrs++].val.programmaticStreamSerializationAllowed = 1;
  }
  if (how.cluster > 1) {
    attributes[config.numAttrs].id = cudaLaunchAttributeClusterDimension;
    attributes[config.numAttrs++].val.clusterDim = {how.cluster, 1, 1};
  }
  return cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...);
}

}  // namespace abiding
