// Asynchronous copies from global to shared memory (cp.async, sm_80): many are in flight without a register.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace abiding {

// The 16 bytes do not stay in L1.
__device__ __forceinline__ void copy_async(uint4* to_shared, const uint4* from) {
  const auto at = static_cast<uint32_t>(__cvta_generic_to_shared(to_shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(at), "l"(from) : "memory");
}
// For the copies of this thread.
__device__ __forceinline__ void wait_for_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

}  // namespace abiding
