// The sm_90 grouped GEMM: the producer warpgroup. A lane of one warp has TMA load weights, scales and tokens; where
// tiles are large, scale converter warps turn scale codes into bf16 in shared memory, which consumers would otherwise
// do between two wgmmas. Beside e4m3 tokens they make one float of a row's codes.
#pragma once

#include "common/launch.cuh"
#include "mxfp8_moe/grouped_mm_sm90/config.cuh"
#include "mxfp8_moe/grouped_mm_sm90/scheduler.cuh"

namespace abiding::mxfp8_moe::sm90_mm {

// 0x80 in the place of each of four scale codes that is 0 or 255, of which all bits are equal. As bf16, the bits of a
// code are those of the exponent, and bit 6 makes 2^-127 of code 0 and NaN of 255: both come from __byte_perm of codes
// and special codes, shifted right by one.
__device__ __forceinline__ uint32_t special_codes(uint32_t codes) {
  return ~(((codes ^ codes >> 1) & 0x7F7F7F7F) + 0x7F7F7F7F) & 0x80808080;
}

// What the loads of a work tile's stages have in common. Computed once per tile: the consumers of an SM share its issue
// slots with the producer.
template <class C>
struct TileLoads {
  const Cta<C>& cta;
  const CUtensorMap* tokens;
  const uint8_t* scales[C::kScaleTiles];  // of K tile 0
  int expert, row, token;                 // its first weight row, and its first token
  int slab_rows;                          // of tokens, in shared memory
  uint32_t bytes;                         // of a stage

  __device__ __forceinline__ TileLoads(const Cta<C>& cta, const WorkTile& w)
      : cta(cta),
        tokens(cta.tokens->of_width + (w.n / C::kTileStep - 1)),
        expert(w.expert),
        row(w.m_tile * C::kBlockM),
        token(w.first_token),
        slab_rows(w.n),
        bytes(C::kWeightBytes + C::kWeightScaleBytes + C::kSlabs * w.n * 128) {
    const KernelParams& a = cta.a;
#pragma unroll
    for (int i = 0; i < C::kScaleTiles; ++i) {
      // The second CTA of a cluster may have no weight rows. It must still load scales that exist.
      const int first = row + i * kScaleTileRows;
      scales[i] = a.p.weight_scales + expert * a.expert_scale_bytes + (first < a.p.n ? first * a.scale_columns : 0);
    }
  }

  // Opens a stage: announces all of its bytes, tokens included, and loads weights and scales.
  __device__ __forceinline__ void load_weights(int stage, int k_tile) const {
    const uint32_t barrier = cta.full_barrier(stage);
    mbarrier_arrive_expect_tx(barrier, bytes);
    tma_load_3d(cta.weight_smem(stage), cta.weights, k_tile * C::kBlockK, row, expert, barrier);
#pragma unroll
    for (int i = 0; i < C::kScaleTiles; ++i)
      bulk_load(cta.scale_smem(stage) + i * kScaleTileBytes, scales[i] + k_tile * C::kBlockK / 128 * kScaleTileBytes,
                kScaleTileBytes, barrier);
  }

  __device__ __forceinline__ void load_tokens(int stage, int k_tile) const {
    const uint32_t to = cta.token_smem(stage), barrier = cta.full_barrier(stage);
    if constexpr (C::kCluster == ClusterMode::kMulticast) {
      const int first = static_cast<int>(cta.cluster_rank) * (slab_rows / 2);
      tma_load_2d_multicast(to + first * 128, tokens, k_tile * C::kSlabK, token + first, barrier, 3);
    } else {
#pragma unroll
      for (int i = 0; i < C::kSlabs; ++i)
        tma_load_2d(to + i * slab_rows * 128, tokens, k_tile * C::kBlockK + i * C::kSlabK, token, barrier);
    }
  }
};

// One warp, of which a lane loads. PDL contract (layer.cu): weights of the first stages may be loaded before pdl_wait,
// tokens only after it.
template <class C>
__device__ __forceinline__ void produce(const Cta<C>& cta) {
  Scheduler<C> tiles(cta);
  PipelineState<C::kStages> at;  // the loading lane's, which is the same one each time
  int preloaded = 0;
  if (cta.a.p.inputs_ready_before_pdl && !tiles.done()) {
    const WorkTile w = tiles.tile();
    preloaded = min(w.k_tiles, kStagesBeforePdlWait);
    if (elect_one()) {
      const TileLoads<C> loads(cta, w);
#pragma unroll 1
      for (int i = 0; i < preloaded; ++i) loads.load_weights(i, w.k_begin + i);
    }
  }
  pdl_wait();
  while (!tiles.done()) {
    const WorkTile w = tiles.tile();
    tiles.advance(w);
    if (elect_one()) {
      const TileLoads<C> loads(cta, w);
#pragma unroll 1
      for (int i = 0; i < w.k_tiles; ++i) {
        mbarrier_wait(cta.empty_barrier(at.stage), at.phase ^ 1);
        // Beside e4m3 tokens consumers release a stage without waiting for its scale converter warps.
        if constexpr (C::kFp8) mbarrier_wait(cta.ready_barrier(at.stage), at.phase ^ 1);
        if (i >= preloaded) loads.load_weights(at.stage, w.k_begin + i);
        loads.load_tokens(at.stage, w.k_begin + i);
        at.advance();
      }
    }
    preloaded = 0;
    __syncwarp();
  }
  // Drain: the CTA's shared memory must outlive every load into it and every remote arrival on its barriers.
  if (elect_one())
    for (int i = 0; i < C::kStages; ++i, at.advance()) mbarrier_wait(cta.empty_barrier(at.stage), at.phase ^ 1);
  __syncwarp();
}

// Beside e4m3 tokens, one warp per 128 weight rows: a row's codes must be the same in all K tiles of a work tile. In
// the last of them the codes of a row become its scale, a float, which is NaN where they are not. Warp 0 adds the
// tokens' scales.
template <class C>
__device__ __forceinline__ void convert_row_scales(const Cta<C>& cta, int warp) {
  const int lane = threadIdx.x % 32;
  PipelineState<C::kStages> at;
  pdl_wait();  // the tokens' scales are the upstream kernel's
  for (Scheduler<C> tiles(cta); !tiles.done();) {
    const WorkTile w = tiles.tile();
    tiles.advance(w);
    float token_scales[(C::kBlockN + 31) / 32];
#pragma unroll
    for (int t = 0; t < C::kBlockN; t += 32)
      token_scales[t / 32] = warp == 0 && t + lane < w.tokens ? cta.a.p.a_scales[w.first_token + t + lane] : 0.0f;
    uint32_t codes = 0, differing = 0;  // of rows l, l + 32, l + 64 and l + 96 of lane l: a byte each, a bit each
    for (int i = w.k_begin; i < w.k_begin + w.k_tiles; ++i, at.advance()) {
      mbarrier_wait(cta.full_barrier(at.stage), at.phase);
      const uint32_t line = cta.scale_smem(at.stage) + warp * kScaleTileBytes + lane * 16;
      const int existing = cta.a.scale_blocks - i * kScaleTileBlocks;  // blocks that belong to K
      const uint32_t mask = existing < kScaleTileBlocks ? (1u << 8 * existing) - 1 : ~0u;
      uint32_t words[4];
      load_shared_v4(words, line);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        if (i == w.k_begin) codes |= (words[j] & 0xFF) << 8 * j;
        if ((words[j] ^ __byte_perm(codes, 0, 0x1111 * j)) & mask) differing |= 1u << j;
      }
      if (i + 1 == w.k_begin + w.k_tiles) {
#pragma unroll
        for (int j = 0; j < 4; ++j)
          words[j] = differing >> j & 1 ? 0x7FC00000 : __float_as_uint(ue8m0_decode(codes >> 8 * j & 0xFF));
        store_shared_v4(line, words);
#pragma unroll
        for (int t = 0; t < C::kBlockN; t += 32)
          if (warp == 0 && t + lane < C::kBlockN)
            store_shared_f32(cta.token_scale_smem(at.stage) + (t + lane) * 4, token_scales[t / 32]);
        fence_proxy_async();
      }
      __syncwarp();  // all lanes have read and written
      if (lane == 0) mbarrier_arrive(cta.ready_barrier(at.stage));
    }
  }
}

// One warp per 128 weight rows: replaces a row's four codes of 128 of K by the two bf16 scales of the stage's 64 of K.
template <class C>
__device__ __forceinline__ void convert_scales(const Cta<C>& cta, int warp) {
  PipelineState<C::kStages> at;
  for (Scheduler<C> tiles(cta); !tiles.done(); tiles.position += tiles.clusters())
    for (int i = 0; i < cta.a.k_tiles; ++i, at.advance()) {
      mbarrier_wait(cta.full_barrier(at.stage), at.phase);
      const uint32_t line = cta.scale_smem(at.stage) + warp * kScaleTileBytes + threadIdx.x % 32 * 16;
      uint32_t words[4];
      load_shared_v4(words, line);
#pragma unroll
      for (uint32_t& word : words) {
        word = __byte_perm(word, special_codes(word), 0x1504 + 0x1111 * (i % 2 * 2)) >> 1;
        if (2 * i + 1 == cta.a.scale_blocks) word = 0x3F80 << 16 | (word & 0xFFFF);  // 1.0 behind K, as in RowScale
      }
      store_shared_v4(line, words);
      fence_proxy_async();
      mbarrier_arrive(cta.ready_barrier(at.stage));
    }
}

}  // namespace abiding::mxfp8_moe::sm90_mm
