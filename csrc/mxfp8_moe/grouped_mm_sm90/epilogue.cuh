// The sm_90 grouped GEMM: the epilogue of a consumer warpgroup. Accumulators are rounded once and stored. With
// stream-K, the accumulators of all parts of a tile but the first go to the CTA with the part before, which stores the
// sum. They travel through distributed shared memory.
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

// A warp's 16 weight rows x 16 tokens: transposed in the warp's staging memory, stored as 16-byte vectors of tokens.
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
  if constexpr (N % 16 == 8) {
    constexpr int i = N / 16;
    const float last[8] = {d[8 * i], d[8 * i + 1], d[8 * i + 2], d[8 * i + 3]};
    if (i * 16 < w.tokens) store_16x16<T>(last, staging, out + i * 16 * p.out_stride, p.out_stride, w.tokens - i * 16);
  }
}

// Stream-K: hands the accumulators to CTA cta.cluster_rank - 1 of the cluster, which has the part before this one.
template <class C, int N>
__device__ __forceinline__ void send_part(const Cta<C>& cta, const float (&d)[N / 2]) {
  const uint32_t barrier = mapa(cta.part_barrier(), cta.cluster_rank - 1);
  const uint32_t to = mapa(cta.part_smem(), cta.cluster_rank - 1) + threadIdx.x * 16;
#pragma unroll
  for (int i = 0; i < N / 8; ++i) st_async_v4(to + i * C::kConsumerThreads * 16, d + 4 * i, barrier);
}

// Adds the part that the rank above hands over. A CTA receives at most one, so the barrier has one phase.
template <class C, int N>
__device__ __forceinline__ void add_part(const Cta<C>& cta, float (&d)[N / 2]) {
  if (threadIdx.x == 0) mbarrier_arrive_expect_tx(cta.part_barrier(), N / 2 * C::kConsumerThreads * 4);
  mbarrier_wait(cta.part_barrier(), 0);
#pragma unroll
  for (int i = 0; i < N / 8; ++i) {
    float part[4];
    asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(part[0]), "=f"(part[1]), "=f"(part[2]), "=f"(part[3])
                 : "r"(cta.part_smem() + (i * C::kConsumerThreads + threadIdx.x) * 16));
#pragma unroll
    for (int j = 0; j < 4; ++j) d[4 * i + j] += part[j];
  }
}

// What applies to a whole sum goes behind the stream-K block; store_value() in grouped_mm_portable.cu and store() in
// cpu.cpp are its counterparts.
template <class C, int N>
__device__ __forceinline__ void epilogue(const Cta<C>& cta, float (&d)[N / 2], const WorkTile& w) {
  if constexpr (C::kCluster == ClusterMode::kStreamK) {
    if (w.k_begin + w.k_tiles < cta.a.k_tiles) add_part<C, N>(cta, d);
    if (w.k_begin > 0) return send_part<C, N>(cta, d);
  }
  const int warp = threadIdx.x / 32;
  const int64_t row = int64_t{w.m_tile} * C::kBlockM + warp * 16;
  const uint32_t staging = cta.smem + SmemLayout<C>::kEpilogue + warp * C::kEpilogueBytes;
  const GroupedMmParams& p = cta.a.p;
  switch (p.out_dtype) {
    case DType::kBfloat16: return store_tile<__nv_bfloat16, N>(d, staging, p, w, row);
    case DType::kFloat16: return store_tile<__half, N>(d, staging, p, w, row);
    case DType::kFloat32: return store_tile<float, N>(d, staging, p, w, row);
    default: return;
  }
}

}  // namespace abiding::mxfp8_moe::sm90_mm
