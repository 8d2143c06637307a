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

// How columns of the output, 64 weight rows, travel through a warpgroup's staging memory, so that those of a token are
// stored as one line: a batch of tokens at a time, in groups of as many as give each thread a 16-byte vector.
template <class C, class T>
struct Staging {
  static constexpr int kVectors = 64 * sizeof(T) / 16, kGroup = 128 / kVectors, kBatch = kGroup * C::kStagingVectors;
  static constexpr uint32_t kGroupBytes = C::kStagingBytes / C::kStagingVectors;

  // One past the last token of the batch from `first` on, in a tile of n tokens.
  static ABIDING_HD constexpr int batch_end(int first, int n) { return first + kBatch < n ? first + kBatch : n; }
  // The offset of a vector of a token in a buffer; permuted, against bank conflicts.
  static __device__ __forceinline__ uint32_t offset(int token, int vector) {
    return (token * kVectors + (vector ^ token % 8)) * 16;
  }
};

// Puts tokens [kFirst, kEnd) of a warp's rows into a staging buffer.
template <class C, class T, int kFirst, int kEnd>
__device__ __forceinline__ void stage_tokens(const float* d, uint32_t buffer) {
  using Shape = Staging<C, T>;
  constexpr int kCount = kEnd - kFirst < Shape::kGroup ? kEnd - kFirst : Shape::kGroup;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
  if constexpr (sizeof(T) == 4) {
#pragma unroll
    for (int i = 0; i < kCount / 2; ++i) {
      const int token = i / 4 * 8 + lane % 4 * 2 + i % 2, row = warp * 16 + lane / 4 + i / 2 % 2 * 8;
      store_shared_f32(buffer + Shape::offset(token, row / 4) + row % 4 * 4, d[kFirst / 2 + i]);
    }
  } else {
    uint32_t words[kCount / 4];
#pragma unroll
    for (int i = 0; i < kCount / 4; ++i) words[i] = round_pair<T>(d[kFirst / 2 + 2 * i], d[kFirst / 2 + 2 * i + 1]);
    stmatrix_trans<kCount / 4>(buffer + Shape::offset(lane / 16 * 8 + lane % 8, warp * 2 + lane / 8 % 2), words);
  }
  if constexpr (kFirst + kCount < kEnd) stage_tokens<C, T, kFirst + kCount, kEnd>(d, buffer + Shape::kGroupBytes);
}

// Stores tokens [kFirst, kEnd), of which this thread has a vector of each group. `to` is where the first one goes.
template <class C, class T, int kFirst, int kEnd>
__device__ __forceinline__ void store_groups(const Cta<C>& cta, const uint32_t (*words)[4], const WorkTile& w, T* to,
                                             bool exists) {
  using Shape = Staging<C, T>;
  constexpr int kCount = kEnd - kFirst < Shape::kGroup ? kEnd - kFirst : Shape::kGroup;
  const int token = threadIdx.x % 128 / Shape::kVectors;
  if (exists && kFirst + token < w.tokens && token < kCount) store_global_v4(to, words[0]);
  if constexpr (kFirst + kCount < kEnd)
    store_groups<C, T, kFirst + kCount, kEnd>(cta, words + 1, w, to + kCount * cta.a.p.out_stride, exists);
}

// Stores tokens [kFirst, kEnd) from a staging buffer.
template <class C, class T, int kFirst, int kEnd>
__device__ __forceinline__ void store_staged(const Cta<C>& cta, const WorkTile& w, uint32_t buffer, T* to,
                                             bool exists) {
  using Shape = Staging<C, T>;
  constexpr int kGroups = (kEnd - kFirst + Shape::kGroup - 1) / Shape::kGroup;
  const int thread = threadIdx.x % 128, token = thread / Shape::kVectors, vector = thread % Shape::kVectors;
  uint32_t words[kGroups][4];
#pragma unroll
  for (int i = 0; i < kGroups; ++i)
    load_shared_v4(words[i], buffer + i * Shape::kGroupBytes + Shape::offset(token, vector));
  store_groups<C, T, kFirst, kEnd>(cta, words, w, to, exists);
}

// Stores the tokens from kFirst on. Batches take turns in two buffers: when one is written again, its readers have
// passed the barrier of the batch between. Overlapping batches, or a loop in store_groups, makes ptxas schedule the
// mainloop of bf16 tokens worse: compare the machine code of all kernels after a change here (tools/compare_sass.py).
template <class C, class T, int N, int kFirst>
__device__ __forceinline__ void store_tokens(const Cta<C>& cta, const float (&d)[N / 2], const WorkTile& w,
                                             uint32_t staging, T* to, bool exists) {
  using Shape = Staging<C, T>;
  constexpr int kEnd = Shape::batch_end(kFirst, N);
  const uint32_t buffer = staging + kFirst / Shape::kBatch % 2 * C::kStagingBytes;
  stage_tokens<C, T, kFirst, kEnd>(d, buffer);
  named_barrier_sync(1 + threadIdx.x / 128, 128);
  store_staged<C, T, kFirst, kEnd>(cta, w, buffer, to, exists);
  if constexpr (kEnd < N)
    if (kEnd < w.tokens)
      store_tokens<C, T, N, kEnd>(cta, d, w, staging, to + (kEnd - kFirst) * cta.a.p.out_stride, exists);
}

// The same by TMA, which reads a buffer while this warpgroup goes on to the next batch or tile. It stores whole
// batches: in the box of one that is not full there are rows of the next tile or expert. `column` is the first of the
// block.
template <class C, class T, int N, int kFirst>
__device__ __forceinline__ void tma_store_tokens(const Cta<C>& cta, const float (&d)[N / 2], const WorkTile& w,
                                                 uint32_t staging, T* to, bool exists, int column, int block) {
  using Shape = Staging<C, T>;
  constexpr int kEnd = Shape::batch_end(kFirst, N);
  static_assert(N <= 2 * Shape::kBatch);
  const bool leader = threadIdx.x % 128 == 0;
  const uint32_t buffer = staging + kFirst / Shape::kBatch * C::kStagingBytes;
  // Two batches of a block take turns in two buffers. Before the first one of a tile, or where there is one per block,
  // the latest store may be from the same buffer.
  if (leader) {
    if (N <= Shape::kBatch || (kFirst == 0 && block == 0))
      bulk_wait_read<0>();
    else
      bulk_wait_read<1>();
  }
  named_barrier_sync(1 + threadIdx.x / 128, 128);
  stage_tokens<C, T, kFirst, kEnd>(d, buffer);
  fence_proxy_async();
  named_barrier_sync(1 + threadIdx.x / 128, 128);
  if (kEnd - kFirst == Shape::kBatch && kEnd <= w.tokens) {
    if (leader && column < cta.a.p.n) tma_store_2d(cta.out, column, w.first_token + kFirst, buffer);
  } else {
    store_staged<C, T, kFirst, kEnd>(cta, w, buffer, to, exists);
  }
  if (leader) bulk_commit();  // a group per batch, for the waits count groups
  if constexpr (kEnd < N)
    if (kEnd < w.tokens)
      tma_store_tokens<C, T, N, kEnd>(cta, d, w, staging, to + (kEnd - kFirst) * cta.a.p.out_stride, exists, column,
                                      block);
}

template <class C, class T, int N>
__device__ __forceinline__ void store_tile(const Cta<C>& cta, const float (&d)[N / 2], const WorkTile& w, int block) {
  using Shape = Staging<C, T>;
  const GroupedMmParams& p = cta.a.p;
  const int warpgroup = threadIdx.x / 128, thread = threadIdx.x % 128;
  const int64_t column = int64_t{w.m_tile} * C::kBlockM + warpgroup * C::kWarpgroupRows + block * 64 +
                         thread % Shape::kVectors * (16 / sizeof(T));
  T* to = static_cast<T*>(p.out) + (w.first_token + thread / Shape::kVectors) * p.out_stride + column;
  const uint32_t staging = cta.smem + SmemLayout<C>::kEpilogue + warpgroup * C::kEpilogueBytes;
  // n is a multiple of 32, so vectors are inside or outside as a whole.
  if constexpr (C::kHalves && sizeof(T) == 2) {
    const int first = w.m_tile * C::kBlockM + warpgroup * C::kWarpgroupRows + block * 64;
    tma_store_tokens<C, T, N, 0>(cta, d, w, staging, to, column < p.n, first, block);
  } else {
    named_barrier_sync(1 + warpgroup, 128);  // a warp may still read what the tile before left in the staging memory
    store_tokens<C, T, N, 0>(cta, d, w, staging, to, column < p.n);
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
// cpu.cpp are its counterparts. `block` is that of the warpgroup's weight rows.
template <class C, int N>
__device__ __forceinline__ void epilogue(const Cta<C>& cta, float (&d)[N / 2], const WorkTile& w, int block) {
  if constexpr (C::kCluster == ClusterMode::kStreamK) {
    if (w.k_begin + w.k_tiles < cta.a.k_tiles) add_part<C, N>(cta, d);
    if (w.k_begin > 0) return send_part<C, N>(cta, d);
  }
  switch (cta.a.p.out_dtype) {
    case DType::kBfloat16: return store_tile<C, __nv_bfloat16, N>(cta, d, w, block);
    case DType::kFloat16: return store_tile<C, __half, N>(cta, d, w, block);
    case DType::kFloat32: return store_tile<C, float, N>(cta, d, w, block);
    default: return;
  }
}

}  // namespace abiding::mxfp8_moe::sm90_mm
