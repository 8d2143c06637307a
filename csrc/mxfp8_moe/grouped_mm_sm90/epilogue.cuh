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

// Matrices of 8 weight rows x 8 tokens, transposed: lane 8m + r holds the address of token r of matrix m.
template <int kMatrices>
__device__ __forceinline__ void stmatrix_trans(uint32_t at, const uint32_t (&words)[kMatrices]) {
  static_assert(kMatrices == 4 || kMatrices == 2);
  if constexpr (kMatrices == 4)
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(at), "r"(words[0]),
                 "r"(words[1]), "r"(words[2]), "r"(words[3])
                 : "memory");
  else
    asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1, %2};" ::"r"(at), "r"(words[0]),
                 "r"(words[1])
                 : "memory");
}

// How a warpgroup's columns of the output travel through its staging memory, so that those of a token are stored as one
// line: a batch of tokens at a time, a 16-byte vector per thread. There are two buffers.
template <class T>
struct Staging {
  static constexpr int kVectors = 64 * sizeof(T) / 16, kTokens = 128 / kVectors;

  // The offset of a vector of a token in a buffer; permuted, against bank conflicts.
  static __device__ __forceinline__ uint32_t offset(int token, int vector) {
    return (token * kVectors + (vector ^ token % 8)) * 16;
  }
};

// Puts tokens [kFirst, kFirst + kCount) of a warp's rows into a staging buffer.
template <class T, int kFirst, int kCount>
__device__ __forceinline__ void stage_tokens(const float* d, uint32_t buffer) {
  using Shape = Staging<T>;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
  d += kFirst / 2;
  if constexpr (sizeof(T) == 4) {
#pragma unroll
    for (int i = 0; i < kCount / 2; ++i) {
      const int token = i / 4 * 8 + lane % 4 * 2 + i % 2, row = warp * 16 + lane / 4 + i / 2 % 2 * 8;
      store_shared_f32(buffer + Shape::offset(token, row / 4) + row % 4 * 4, d[i]);
    }
  } else {
    uint32_t words[kCount / 4];
#pragma unroll
    for (int i = 0; i < kCount / 4; ++i) words[i] = round_pair<T>(d[2 * i], d[2 * i + 1]);
    stmatrix_trans<kCount / 4>(buffer + Shape::offset(lane / 16 * 8 + lane % 8, warp * 2 + lane / 8 % 2), words);
  }
}

// A warpgroup's part of a tile, from token kFirst on. `to` is where this thread's vector of its first token goes.
template <class C, class T, int N, int kFirst>
__device__ __forceinline__ void store_tokens(const Cta<C>& cta, const float (&d)[N / 2], const WorkTile& w,
                                             uint32_t staging, T* to, bool exists) {
  using Shape = Staging<T>;
  constexpr int kCount = N - kFirst < Shape::kTokens ? N - kFirst : Shape::kTokens;
  const GroupedMmParams& p = cta.a.p;
  const int thread = threadIdx.x % 128, token = thread / Shape::kVectors, vector = thread % Shape::kVectors;
  const uint32_t buffer = staging + kFirst / Shape::kTokens % 2 * C::kStagingBytes;
  // A buffer is written again two batches later: its readers have then passed the barrier of the batch between.
  stage_tokens<T, kFirst, kCount>(d, buffer);
  named_barrier_sync(1 + threadIdx.x / 128, 128);
  uint32_t words[4];
  load_shared_v4(words, buffer + Shape::offset(token, vector));
  if (exists && kFirst + token < w.tokens && token < kCount)
    *reinterpret_cast<uint4*>(to) = uint4{words[0], words[1], words[2], words[3]};
  if constexpr (kFirst + kCount < N)
    if (kFirst + kCount < w.tokens)
      store_tokens<C, T, N, kFirst + kCount>(cta, d, w, staging, to + kCount * p.out_stride, exists);
}

template <class C, class T, int N>
__device__ __forceinline__ void store_tile(const Cta<C>& cta, const float (&d)[N / 2], const WorkTile& w) {
  using Shape = Staging<T>;
  const GroupedMmParams& p = cta.a.p;
  const int warpgroup = threadIdx.x / 128, thread = threadIdx.x % 128;
  const int64_t column = int64_t{w.m_tile} * C::kBlockM + warpgroup * 64 + thread % Shape::kVectors * (16 / sizeof(T));
  T* to = static_cast<T*>(p.out) + (w.first_token + thread / Shape::kVectors) * p.out_stride + column;
  named_barrier_sync(1 + warpgroup, 128);  // a warp may still read what the tile before left in the staging memory
  // n is a multiple of 32, so vectors are inside or outside as a whole.
  store_tokens<C, T, N, 0>(cta, d, w, cta.smem + SmemLayout<C>::kEpilogue + warpgroup * C::kEpilogueBytes, to,
                           column < p.n);
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
  switch (cta.a.p.out_dtype) {
    case DType::kBfloat16: return store_tile<C, __nv_bfloat16, N>(cta, d, w);
    case DType::kFloat16: return store_tile<C, __half, N>(cta, d, w);
    case DType::kFloat32: return store_tile<C, float, N>(cta, d, w);
    default: return;
  }
}

}  // namespace abiding::mxfp8_moe::sm90_mm
