// What the lanes of a warp do together.
#pragma once

namespace abiding {

// The sum of the values of this lane and of all lanes before it.
__device__ __forceinline__ int inclusive_sum(int value) {
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const int other = __shfl_up_sync(~0u, value, step);
    if (static_cast<int>(threadIdx.x % 32) >= step) value += other;
  }
  return value;
}

}  // namespace abiding
