#include <cuda_runtime.h>

#include "common/launch.cuh"
#include "common/vec16.cuh"
#include "mla_prologue/kernels.h"

namespace abiding::mla_prologue {
namespace {

constexpr int kWarpsPerCta = 4;

// One warp per row. Lane l reads values [8l, 8l + 8) and [256 + 8l, 256 + 8l + 8), as two 16-byte vectors; the second
// vector of lanes 24..31 holds RoPE values.
template <class T>
__global__ void __launch_bounds__(32 * kWarpsPerCta) gather_kernel(const __grid_constant__ GatherParams p) {
  const int lane = threadIdx.x % 32;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kWarpsPerCta + threadIdx.x / 32;
  if (row >= p.rows) return;
  pdl_wait();
  pdl_launch_dependents();
  const int64_t slot = p.slots[row];
  uint4 vectors[2] = {};
  if (slot >= 0 && slot < p.pages * p.block_size) {
    const Record<const uint8_t> record = record_at(p.cache, p.page_stride, p.block_size, slot);
#pragma unroll
    for (int v = 0; v < 2; ++v) {
      const int first = v * kHeadDim / 2 + 8 * lane;
      if (first < kNopeDim) {
        const uint2 bytes = *reinterpret_cast<const uint2*>(record.data + first);
        const float scale = ue8m0_decode(record.scales[first / kQuantBlock]);
        float x[8];
#pragma unroll
        for (int j = 0; j < 8; ++j)
          x[j] = e4m3_decode(static_cast<uint8_t>((j < 4 ? bytes.x : bytes.y) >> 8 * (j % 4))) * scale;
        vectors[v] = pack<T>(x);
      } else {
        const uint2* rope = reinterpret_cast<const uint2*>(record.data + kNopeDim + 2 * (first - kNopeDim));
        vectors[v] = {rope[0].x, rope[0].y, rope[1].x, rope[1].y};
      }
    }
  }
  uint4* out = reinterpret_cast<uint4*>(static_cast<T*>(p.out) + row * p.out_stride);
  out[lane] = vectors[0];
  out[32 + lane] = vectors[1];
}

template <class T>
cudaError_t launch_gather(const GatherParams& p, cudaStream_t stream) {
  const unsigned ctas = static_cast<unsigned>((p.rows + kWarpsPerCta - 1) / kWarpsPerCta);
  return launch(gather_kernel<T>, LaunchConfig{ctas, 32 * kWarpsPerCta}, stream, p);
}

}  // namespace

cudaError_t run_cuda(const GatherParams& p, cudaStream_t stream) {
  return dispatch_16_bit(p.dtype, [&](auto tag) { return launch_gather<CudaType<decltype(tag)>>(p, stream); });
}

}  // namespace abiding::mla_prologue
