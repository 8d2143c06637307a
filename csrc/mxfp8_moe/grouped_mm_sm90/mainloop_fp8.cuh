// The sm_90 grouped GEMM: the mainloop of a consumer warpgroup for e4m3 tokens. wgmma reads weights and tokens from
// shared memory. The tensor core adds in fewer bits than fp32 has, so its accumulators hold one K tile (128 of K) and
// are then added to fp32 sums in registers (promotion). A row has one scale, of weights and of tokens, applied to the
// sums.
#pragma once

#include "mxfp8_moe/grouped_mm_sm90/config.cuh"
#include "mxfp8_moe/grouped_mm_sm90/mainloop.cuh"
#include "mxfp8_moe/grouped_mm_sm90/scheduler.cuh"
#include "mxfp8_moe/grouped_mm_sm90/wgmma.cuh"

namespace abiding::mxfp8_moe::sm90_mm {

__device__ __forceinline__ float lds_f32(uint32_t address) { return __uint_as_float(lds_u32(address)); }
__device__ __forceinline__ float2 lds_f32x2(uint32_t address) {
  float2 two;
  asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(two.x), "=f"(two.y) : "r"(address));
  return two;
}

// d = this thread's sums of a work tile of width N, scaled.
template <class C, int N>
__device__ __forceinline__ void mainloop_fp8(const Cta<C>& cta, float (&d)[N / 2], const WorkTile& w,
                                             PipelineState<C::kStages>& at) {
  const int lane = threadIdx.x % 32, row = threadIdx.x / 32 * 16 + lane / 4;
  static_assert(C::kBlockM == kScaleTileRows);
#pragma unroll
  for (float& sum : d) sum = 0;
  int stage = at.stage;
  for (int i = 0; i < w.k_tiles; ++i) {
    float part[N / 2];
    stage = at.stage;
    mbarrier_wait(cta.ready_barrier(stage), at.phase);
    at.advance();
    const uint64_t weights = make_smem_desc_128b(cta.weight_smem(stage), threadIdx.x / 128 * 64 * 128);
    const uint64_t tokens = make_smem_desc_128b(cta.token_smem(stage), 0);
    wgmma_fence();
#pragma unroll
    for (int mma = 0; mma < C::kBlockK / 32; ++mma)
      WgmmaE4m3<N>::run(part, weights + mma * 2, tokens + mma * 2, mma > 0);
    wgmma_commit();
    wgmma_wait<0>();
    if (i + 1 < w.k_tiles) release_stage(cta, stage);
#pragma unroll
    for (int j = 0; j < N / 2; ++j) d[j] += part[j];
  }
  // The last stage has the scales (convert_row_scales).
  const uint32_t scales = cta.scale_smem(stage) + row % 32 * 16 + row / 32 * 4;
  const float scale = lds_f32(scales), scale8 = lds_f32(scales + 128);
#pragma unroll
  for (int j = 0; j < N / 8; ++j) {
    const float2 token_scale = lds_f32x2(cta.token_scale_smem(stage) + (8 * j + lane % 4 * 2) * 4);
    d[4 * j] = d[4 * j] * token_scale.x * scale;
    d[4 * j + 1] = d[4 * j + 1] * token_scale.y * scale;
    d[4 * j + 2] = d[4 * j + 2] * token_scale.x * scale8;
    d[4 * j + 3] = d[4 * j + 3] * token_scale.y * scale8;
  }
  release_stage(cta, stage);
}

}  // namespace abiding::mxfp8_moe::sm90_mm
