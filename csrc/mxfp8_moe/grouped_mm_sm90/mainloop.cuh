// The sm_90 grouped GEMM: the mainloop of a consumer warpgroup. It reads e4m3 weights from shared memory, makes scaled
// bf16 of them in registers, and multiplies them with the tokens in shared memory (wgmma with A from registers).
#pragma once

#include "mxfp8_moe/grouped_mm_sm90/config.cuh"
#include "mxfp8_moe/grouped_mm_sm90/producer.cuh"
#include "mxfp8_moe/grouped_mm_sm90/scheduler.cuh"
#include "mxfp8_moe/grouped_mm_sm90/wgmma.cuh"

namespace abiding::mxfp8_moe::sm90_mm {

__device__ __forceinline__ uint16_t lds_u16(uint32_t address) {
  uint16_t value;
  asm volatile("ld.shared.u16 %0, [%1];" : "=h"(value) : "r"(address));
  return value;
}
__device__ __forceinline__ uint32_t lds_u32(uint32_t address) {
  uint32_t value;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(value) : "r"(address));
  return value;
}
// Four matrices of 8 rows x 16 bytes: a lane gets word lane % 4 of row lane / 4. Lane 8m + r holds the address of row r
// of matrix m.
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&words)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "r"(address));
}

// The scales of a weight row in a stage: four codes, or two converted bf16.
template <class C>
struct RowScale {
  uint32_t word;
  uint32_t special = 0;

  // `existing` of the codes belong to K. Behind K weights are zeros, but a code there may be NaN: it becomes 1.
  __device__ __forceinline__ RowScale(uint32_t address, int existing) : word(lds_u32(address)) {
    if constexpr (C::kConvertedScales) return;
    if (existing < kScaleTileBlocks) {
      const uint32_t mask = (1u << 8 * existing) - 1;
      word = (word & mask) | (0x7F7F7F7F & ~mask);
    }
    special = special_codes(word);
  }
  // The scale of block i in both halves of a word.
  __device__ __forceinline__ uint32_t bf16x2(int i) const {
    if constexpr (C::kConvertedScales) return __byte_perm(word, 0, 0x1010 + 0x2222 * i);
    return __byte_perm(word, special, 0x0404 + 0x1111 * i) >> 1;
  }
};

// Those of a thread's two weight rows, lane / 4 and 8 below it.
template <class C>
struct RowScales {
  RowScale<C> row, row8;
  __device__ __forceinline__ RowScales(uint32_t address, int existing)
      : row(address, existing), row8(address + 128, existing) {}
};

// Two e4m3 bytes times a scale. e4m3 is exact in bf16, so only the product is rounded, as dequantize() does.
__device__ __forceinline__ uint32_t scale_e4m3x2(uint16_t pair, uint32_t scale) {
  uint32_t halves, result;
  asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(halves) : "h"(pair));
  __half2 two;
  memcpy(&two, &halves, 4);
  const float2 values = __half22float2(two);
  asm("{\n\t.reg .b32 both;\n\tcvt.rn.bf16x2.f32 both, %2, %1;\n\tmul.rn.bf16x2 %0, both, %3;\n\t}"
      : "=r"(result)
      : "f"(values.x), "f"(values.y), "r"(scale));
  return result;
}

// A fragments of half a stage. Per 16 of K a thread holds two pairs of each of its two rows: pairs c and c + 4 with
// c = lane % 4, or, where tokens are interleaved (params.h), the two pairs of word c, which ldmatrix brings in one
// instruction per 32 of K.
//
// The offset of a thread's first pair (or of the 16 bytes that its lane names to ldmatrix) in a stage. 16 bytes of K
// are a swizzle chunk: chunk i of a row lies at (i ^ swizzle), so that chunks are found by XOR. The pitch of rows is
// the stage's K in bytes.
template <class C>
__device__ __forceinline__ uint32_t weight_fragment_offset(int warp, int lane) {
  const int row = warp * 16 + (C::kInterleaved ? lane % 16 : lane / 4), chunk = C::kInterleaved ? lane / 16 : 0;
  const int swizzle = C::kBlockK == 128 ? row % 8 : row / 2 % 4;
  return row * C::kBlockK + (chunk ^ swizzle) * 16 + (C::kInterleaved ? 0 : lane % 4 * 2);
}
template <class C>
__device__ __forceinline__ void load_weight_fragments(uint32_t (&f)[4 * C::kMmasPerHalf], uint32_t address, int half,
                                                      const RowScales<C>& scales) {
#pragma unroll
  for (int mma = 0; mma < C::kMmasPerHalf; ++mma) {
    const int chunk = half * C::kMmasPerHalf + mma;
    const uint32_t at = address ^ chunk * 16;
    const uint32_t scale = scales.row.bf16x2(chunk / 2), scale8 = scales.row8.bf16x2(chunk / 2);
    if constexpr (C::kInterleaved) {
      if (mma % 2 == 1) continue;
      uint32_t words[4];
      ldmatrix_x4(words, at);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        uint16_t low, high;
        asm("mov.b32 {%0, %1}, %2;" : "=h"(low), "=h"(high) : "r"(words[i]));
        uint32_t* const to = f + 4 * (mma + i / 2) + i % 2;
        to[0] = scale_e4m3x2(low, i % 2 ? scale8 : scale);
        to[2] = scale_e4m3x2(high, i % 2 ? scale8 : scale);
      }
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i)
        f[4 * mma + i] = scale_e4m3x2(lds_u16(at + i % 2 * 8 * C::kBlockK + i / 2 * 8), i % 2 ? scale8 : scale);
    }
  }
}

// Every consumer warp arrives once per stage; with multicast also at the other CTA, whose loads write to this one too.
template <class C>
__device__ __forceinline__ void release_stage(const Cta<C>& cta, int stage) {
  if (threadIdx.x % 32 != 0) return;
  if constexpr (C::kCluster == ClusterMode::kMulticast) mbarrier_arrive_remote(cta.peer_empty_barrier + 8 * stage);
  mbarrier_arrive(cta.empty_barrier(stage));
}

template <class C, int N>
__device__ __forceinline__ void mma_half(const Cta<C>& cta, float (&d)[N / 2], const uint32_t (&f)[4 * C::kMmasPerHalf],
                                         int stage, int half, bool first) {
  wgmma_fence();
#pragma unroll
  for (int mma = 0; mma < C::kMmasPerHalf; ++mma) {
    const int k = (half * C::kMmasPerHalf + mma) * 16;
    const uint64_t tile = make_smem_desc_128b(cta.token_smem(stage), k / 64 * (N * 128) + k % 64 * 2);
    Wgmma<N>::run(d, f + 4 * mma, tile, !(first && mma == 0));
  }
  wgmma_commit();
}

// d = this thread's accumulators of a work tile of width N. Fragments of one half are made while the wgmmas of the
// other run.
//
// Stage 0 is peeled: two halves are in flight at loop entry on every path. Otherwise ptxas keeps the accumulators of
// every N live and serializes wgmma for want of registers (C7513).
template <class C, int N>
__device__ __forceinline__ void mainloop(const Cta<C>& cta, float (&d)[N / 2], const WorkTile& w,
                                         PipelineState<C::kStages>& at) {
  const int thread = threadIdx.x, lane = thread % 32, row = thread / 32 * 16 + lane / 4;
  const uint32_t offset = weight_fragment_offset<C>(thread / 32, lane);
  const uint32_t scale_offset = row % 32 * 16 + row % 128 / 32 * 4 + row / 128 * kScaleTileBytes;

  const auto scales_of = [&](int stage, int k_tile) {
    return RowScales<C>(cta.scale_smem(stage) + scale_offset, cta.a.scale_blocks - k_tile * kScaleTileBlocks);
  };
  const auto load = [&](uint32_t (&f)[4 * C::kMmasPerHalf], const RowScales<C>& scales, int stage, int half) {
    load_weight_fragments<C>(f, cta.weight_smem(stage) + offset, half, scales);
  };

  // Never taken (k_tiles >= 1). Kept because without it ptxas spills a register of kM256_N128.
  if (w.k_tiles == 0) {
#pragma unroll
    for (float& value : d) value = 0;
    return;
  }
  uint32_t even[4 * C::kMmasPerHalf], odd[4 * C::kMmasPerHalf];
  mbarrier_wait(cta.ready_barrier(at.stage), at.phase);
  RowScales<C> scales = scales_of(at.stage, w.k_begin);
  load(even, scales, at.stage, 0);
  mma_half<C, N>(cta, d, even, at.stage, 0, true);
  load(odd, scales, at.stage, 1);
  mma_half<C, N>(cta, d, odd, at.stage, 1, false);
  for (int i = 1; i < w.k_tiles; ++i) {
    const int stage = at.stage;
    at.advance();
    mbarrier_wait(cta.ready_barrier(at.stage), at.phase);
    scales = scales_of(at.stage, w.k_begin + i);
    wgmma_wait<1>();
    load(even, scales, at.stage, 0);
    mma_half<C, N>(cta, d, even, at.stage, 0, false);
    wgmma_wait<1>();
    release_stage(cta, stage);
    load(odd, scales, at.stage, 1);
    mma_half<C, N>(cta, d, odd, at.stage, 1, false);
  }
  wgmma_wait<0>();
  release_stage(cta, at.stage);
  at.advance();
}

}  // namespace abiding::mxfp8_moe::sm90_mm
