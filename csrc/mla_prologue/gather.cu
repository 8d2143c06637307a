#include <cuda_runtime.h>

#include "common/launch.cuh"
#include "common/vec16.cuh"
#include "mla_prologue/kernels.h"

namespace abiding::mla_prologue {
namespace {

constexpr int kWarps = 4;

// One warp to a row. Lane l reads the 8 values from 8l and from 256 + 8l; from lane 24 on the latter are RoPE values.
template <class T>
__global__ void __launch_bounds__(32 * kWarps) gather_kernel(const __grid_constant__ GatherParams p) {
  const int lane = threadIdx.x % 32;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (i >= p.rows) return;
  pdl_wait();
  pdl_launch_dependents();
  const int64_t slot = p.slots[i];
  uint4 halves[2] = {};
  if (slot >= 0 && slot < p.pages * p.block_size) {
    const Record<const uint8_t> record = record_at(p.cache, p.page_stride, p.block_size, slot);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int first = half * kHeadDim / 2 + 8 * lane;
      if (first < kNopeDim) {
        const uint2 bytes = *reinterpret_cast<const uint2*>(record.data + first);
        const float scale = ue8m0_decode(record.scales[first / kQuantBlock]);
        float x[8];
#pragma unroll
        for (int j = 0; j < 8; ++j)
          x[j] = e4m3_decode(static_cast<uint8_t>((j < 4 ? bytes.x : bytes.y) >> 8 * (j % 4))) * scale;
        halves[half] = pack<T>(x);
      } else {
        const uint2* rope = reinterpret_cast<const uint2*>(record.data + kNopeDim + 2 * (first - kNopeDim));
        halves[half] = {rope[0].x, rope[0].y, rope[1].x, rope[1].y};
      }
    }
  }
  uint4* out = reinterpret_cast<uint4*>(static_cast<T*>(p.out) + i * p.out_stride);
  out[lane] = halves[0];
  out[32 + lane] = halves[1];
}

template <class T>
cudaError_t launch_gather(const GatherParams& p, cudaStream_t stream) {
  return launch(gather_kernel<T>, LaunchConfig{static_cast<unsigned>((p.rows + kWarps - 1) / kWarps), 32 * kWarps},
                stream, p);
}

}  // namespace

cudaError_t gather(const GatherParams& p, cudaStream_t stream) {
  return dispatch_16_bit(p.dtype, [&](auto tag) { return launch_gather<CudaType<decltype(tag)>>(p, stream); });
}

}  // namespace abiding::mla_prologue
