// Asynchronous copies from global to shared memory (cp.async, sm_80): many are in flight without a register.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace abiding {

// 4 bytes, or 16, which do not stay in L1.
template <class T>
__device__ __forceinline__ void copy_async(T* to_shared, const T* from) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 16);
  const auto at = static_cast<uint32_t>(__cvta_generic_to_shared(to_shared));
  if constexpr (sizeof(T) == 16)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(at), "l"(from) : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(at), "l"(from) : "memory");
}
// For the copies of this thread.
__device__ __forceinline__ void wait_for_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

}  // namespace abiding
