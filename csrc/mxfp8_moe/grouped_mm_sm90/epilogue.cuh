// The sm_90 grouped GEMM: the epilogue of a consumer warpgroup. Accumulators are rounded once and stored; with split-K the CTAs of a
// cluster first reduce them through distributed shared memory.
#pragma once

#include "common/vec16.cuh"
#include "mxfp8_moe/grouped_mm_sm90/config.cuh"
#include "mxfp8_moe/grouped_mm_sm90/scheduler.cuh"

namespace abiding::mxfp8_moe::sm90_mm {

template <class T>
__device__ __forceinline__ uint32_t round_pair(float a, float b) {
  const typename Vec2<T>::type pair = Vec2<T>::round(a, b);
  uint32_t word;
  memcpy(&word, &pair, 4);
  return word;
}

// A warp's 16 weight rows x 16 tokens: transposed in the warp's staging memory, then stored as 16-byte vectors of token rows.
template <class T>
__device__ __forceinline__ void store_16x16(const float* d, uint32_t staging, T* out, int64_t out_stride, int tokens) {
  const int lane = threadIdx.x % 32;
  __syncwarp();
  if constexpr (sizeof(T) == 2) {
    const uint32_t row = staging + (lane / 16 * 8 + lane % 8) * 48 + lane / 8 % 2 * 16;
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(row),
                 "r"(round_pair<T>(d[0], d[1])), "r"(round_pair<T>(d[2], d[3])), "r"(round_pair<T>(d[4], d[5])),
                 "r"(round_pair<T>(d[6], d[7]))
                 : "memory");
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const uint32_t at = staging + (i / 4 * 8 + lane % 4 * 2 + i % 2) * 80 + (lane / 4 + i / 2 % 2 * 8) * 4;
      asm volatile("st.shared.f32 [%0], %1;" ::"r"(at), "f"(d[i]) : "memory");
    }
  }
  __syncwarp();
  constexpr int kVectorsPerToken = sizeof(T) == 2 ? 2 : 4;
  constexpr int kPitch = sizeof(T) == 2 ? 48 : 80;  // bytes; 16 more than a row, against bank conflicts
#pragma unroll
  for (int i = 0; i < kVectorsPerToken / 2; ++i) {
    const int token = (i * 32 + lane) / kVectorsPerToken, vector = lane % kVectorsPerToken;
    uint4 v;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "r"(staging + token * kPitch + vector * 16));
    if (token < tokens) reinterpret_cast<uint4*>(out + token * out_stride)[vector] = v;
  }
}

template <class T, int N>
__device__ __forceinline__ void store_tile(const float (&d)[N / 2], uint32_t staging, const GroupedMmParams& p,
                                           const WorkTile& w, int64_t row) {
  if (row >= p.n) return;  // n is a multiple of 32: 16 rows are inside or outside together
  T* out = static_cast<T*>(p.out) + static_cast<int64_t>(w.first_token) * p.out_stride + row;
#pragma unroll
  for (int i = 0; i < N / 16; ++i)
    if (i * 16 < w.tokens)
      store_16x16<T>(d + 8 * i, staging, out + i * 16 * p.out_stride, p.out_stride, w.tokens - i * 16);
}

// Split-K: each CTA of the cluster reduces one slice of the accumulators, from all CTAs in rank order, so that the sum is
// deterministic. `turn` counts the CTA's tiles: two buffers alternate, so that a fast CTA may send ahead.
template <class C, int N>
__device__ __forceinline__ void reduce_splits(const Cta<C>& cta, float (&d)[N / 2], int turn) {
  const int thread = threadIdx.x, slice = N / 2 / cta.a.splits;
  const uint32_t buffer = cta.reduce_smem(turn % 2), barrier = cta.reduce_barrier(turn % 2);
  if (thread == 0) mbarrier_arrive_expect_tx(barrier, cta.a.splits * slice * C::kConsumerThreads * 4);
#pragma unroll
  for (int i = 0; i < N / 2; ++i) {
    const uint32_t at = buffer + ((cta.rank * slice + i % slice) * C::kConsumerThreads + thread) * 4;
    st_async(mapa(at, i / slice), d[i], mapa(barrier, i / slice));
  }
  mbarrier_wait(barrier, turn / 2 % 2);
#pragma unroll
  for (int i = 0; i < N / 2; ++i) {
    if (i / slice != static_cast<int>(cta.rank)) continue;
    float total = 0;
    for (int split = 0; split < cta.a.splits; ++split) {
      float part;
      asm volatile("ld.shared.f32 %0, [%1];"
                   : "=f"(part)
                   : "r"(buffer + ((split * slice + i % slice) * C::kConsumerThreads + thread) * 4));
      total = split == 0 ? part : total + part;
    }
    d[i] = total;
  }
}

// Stores the slice that this CTA reduced.
template <class C, int N>
__device__ __forceinline__ void store_slice(const Cta<C>& cta, const float (&d)[N / 2], const WorkTile& w,
                                            int64_t row0) {
  const GroupedMmParams& p = cta.a.p;
  const int slice = N / 2 / cta.a.splits, lane = threadIdx.x % 32;
  if (row0 >= p.n) return;
#pragma unroll
  for (int i = 0; i < N / 2; ++i) {
    if (i / slice != static_cast<int>(cta.rank)) continue;
    const int token = i / 4 * 8 + lane % 4 * 2 + i % 2;
    if (token >= w.tokens) continue;
    const int64_t at = (w.first_token + token) * p.out_stride + row0 + lane / 4 + i / 2 % 2 * 8;
    if (p.out_dtype == DType::kBfloat16) static_cast<__nv_bfloat16*>(p.out)[at] = __float2bfloat16_rn(d[i]);
    if (p.out_dtype == DType::kFloat16) static_cast<__half*>(p.out)[at] = __float2half_rn(d[i]);
    if (p.out_dtype == DType::kFloat32) static_cast<float*>(p.out)[at] = d[i];
  }
}

template <class C, int N>
__device__ __forceinline__ void epilogue(const Cta<C>& cta, float (&d)[N / 2], const WorkTile& w, int turn) {
  const int warp = threadIdx.x / 32;
  const int64_t row = int64_t{w.m_tile} * C::kBlockM + warp * 16;
  if constexpr (C::kCluster == ClusterMode::kSplitK) {
    if (cta.a.splits > 1) reduce_splits<C, N>(cta, d, turn);
    store_slice<C, N>(cta, d, w, row);
  } else {
    const uint32_t staging = cta.smem + SmemLayout<C>::kEpilogue + warp * C::kEpilogueBytes;
    const GroupedMmParams& p = cta.a.p;
    switch (p.out_dtype) {
      case DType::kBfloat16: return store_tile<__nv_bfloat16, N>(d, staging, p, w, row);
      case DType::kFloat16: return store_tile<__half, N>(d, staging, p, w, row);
      case DType::kFloat32: return store_tile<float, N>(d, staging, p, w, row);
      default: return;
    }
  }
}

}  // namespace abiding::mxfp8_moe::sm90_mm
