// Properties of the current device.
#pragma once

#include <cuda_runtime_api.h>

namespace abiding {

inline cudaError_t device_attribute(cudaDeviceAttr attribute, int* value) {
  int device = 0;
  const cudaError_t status = cudaGetDevice(&device);
  return status == cudaSuccess ? cudaDeviceGetAttribute(value, attribute, device) : status;
}

inline cudaError_t sm_count(int* sms) { return device_attribute(cudaDevAttrMultiProcessorCount, sms); }

}  // namespace abiding
