// The sm_90 grouped GEMM: the mainloop of a consumer warpgroup for e4m3 tokens. wgmma reads weights and tokens from
// shared memory. The tensor core adds in fewer bits than fp32 has, so its accumulators hold one K tile (128 of K) and
// are then added to fp32 sums in registers (promotion). Where registers allow, the next product is in flight meanwhile.
// A row has one scale, of weights and of tokens, applied to the sums.
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

// d = this thread's sums of a work tile of width N, scaled; one array per block of 64 weight rows. N is divided into
// C::kTokenBlocks.
template <class C, int N>
__device__ __forceinline__ void mainloop_fp8(const Cta<C>& cta, float (&d)[C::kRowBlocks][N / 2], const WorkTile& w,
                                             PipelineState<C::kStages>& at) {
  const int lane = threadIdx.x % 32, thread_row = threadIdx.x % 128 / 32 * 16 + lane / 4;
  // From lane 0, so that wgmma's descriptors are computed in uniform registers.
  const int warpgroup = __shfl_sync(~0u, static_cast<int>(threadIdx.x) / 128, 0);
#pragma unroll
  for (auto& block : d)
#pragma unroll
    for (float& sum : block) sum = 0;
  constexpr int kWidth = N / C::kTokenBlocks;  // of a product
  int stage = at.stage;
  uint32_t phase = at.phase;
  for (int i = 0; i < w.k_tiles; ++i) {
    stage = at.stage, phase = at.phase;
    mbarrier_wait(cta.full_barrier(stage), phase);
    at.advance();
    const uint64_t tokens = make_smem_desc_128b(cta.token_smem(stage), 0);
#pragma unroll
    for (int block = 0; block < C::kRowBlocks; ++block) {
      const uint64_t weights =
          make_smem_desc_128b(cta.weight_smem(stage), (warpgroup * C::kWarpgroupRows + block * 64) * C::kBlockK);
      float parts[C::kTokenBlocks][kWidth / 2];
      wgmma_fence();
#pragma unroll
      for (int part = 0; part < C::kTokenBlocks; ++part) {
#pragma unroll
        for (int mma = 0; mma < C::kBlockK / 32; ++mma)
          WgmmaE4m3<kWidth>::run(parts[part], weights + mma * 2, tokens + part * (kWidth * 128 / 16) + mma * 2,
                                 mma > 0);
        wgmma_commit();
      }
#pragma unroll
      for (int part = 0; part < C::kTokenBlocks; ++part) {
        const bool last = part + 1 == C::kTokenBlocks;
        if (last)
          wgmma_wait<0>();
        else
          wgmma_wait<1>();
        if (last && block + 1 == C::kRowBlocks && i + 1 < w.k_tiles) release_stage(cta, stage);
#pragma unroll
        for (int j = 0; j < kWidth / 2; ++j) d[block][part * (kWidth / 2) + j] += parts[part][j];
      }
    }
  }
  // The last stage has the scales (convert_row_scales).
  mbarrier_wait(cta.ready_barrier(stage), phase);
#pragma unroll
  for (int block = 0; block < C::kRowBlocks; ++block) {
    const int row = warpgroup * C::kWarpgroupRows + block * 64 + thread_row;
    const uint32_t scales =
        cta.scale_smem(stage) + row / kScaleTileRows * kScaleTileBytes + row % 32 * 16 + row % kScaleTileRows / 32 * 4;
    const float scale = lds_f32(scales), scale8 = lds_f32(scales + 128);
#pragma unroll
    for (int j = 0; j < N / 8; ++j) {
      const float2 token_scale = lds_f32x2(cta.token_scale_smem(stage) + (8 * j + lane % 4 * 2) * 4);
      float* sums = d[block] + 4 * j;
      sums[0] = sums[0] * token_scale.x * scale;
      sums[1] = sums[1] * token_scale.y * scale;
      sums[2] = sums[2] * token_scale.x * scale8;
      sums[3] = sums[3] * token_scale.y * scale8;
    }
  }
  __syncwarp();  // all lanes have read their scales, for which lane 0 answers
  release_stage(cta, stage);
}

}  // namespace abiding::mxfp8_moe::sm90_mm
