// What the Python side asks of this binary before it is used.
#include <cuda_runtime_api.h>

#define ABIDING_EXPORT extern "C" __attribute__((visibility("default")))

// The CUDA version that this binary was built for, as 13000 for 13.0.
ABIDING_EXPORT int abiding_cuda_runtime_version() { return CUDART_VERSION; }

// The newest CUDA version that the driver supports; 0 where there is no driver.
ABIDING_EXPORT int abiding_cuda_driver_version() {
  int version = 0;
  return cudaDriverGetVersion(&version) == cudaSuccess ? version : 0;
}
