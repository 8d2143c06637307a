// The sm_90 grouped GEMM: the persistent tile scheduler. Clusters take the tiles round robin; every role of a CTA walks the same
// sequence.
#pragma once

#include "mxfp8_moe/grouped_mm_sm90/config.cuh"

namespace abiding::mxfp8_moe::sm90_mm {

// A CTA tile: some weight rows of an expert x some of its tokens, over the K tiles that this CTA has.
struct WorkTile {
  int expert, m_tile;
  int first_token;       // its row in the tensors
  int tokens;            // that exist, at most n
  int n;                 // the tile's width, in whole TMA boxes
  int k_begin, k_tiles;  // in kBlockK
};

template <class C>
struct Scheduler {
  const Cta<C>& cta;

  __device__ __forceinline__ int cluster_size() const {
    return C::kCluster == ClusterMode::kMulticast ? 2 : cta.a.splits;
  }
  __device__ __forceinline__ int first() const {
    return C::kCluster == ClusterMode::kNone ? blockIdx.x : blockIdx.x / cluster_size();
  }
  __device__ __forceinline__ int step() const {
    return C::kCluster == ClusterMode::kNone ? gridDim.x : gridDim.x / cluster_size();
  }
  __device__ __forceinline__ int count() const { return cta.table.first[cta.a.p.groups.count] * cta.a.m_tiles; }

  // All lanes of a warp call this. Tiles of the same weight rows are neighbors, so that those rows are read from L2.
  __device__ __forceinline__ WorkTile tile(int index) const {
    const KernelParams& a = cta.a;
    WorkTile w;
    w.expert = cta.table.find(index / a.m_tiles);
    const int local = index - cta.table.first[w.expert] * a.m_tiles;
    const int n_tiles = cta.table.first[w.expert + 1] - cta.table.first[w.expert];
    const int m_tile = local / n_tiles, tokens = cta.table.rows[w.expert];
    const TokenRange range = token_range(tokens, C::kTmaBoxRows, n_tiles, local - m_tile * n_tiles);
    w.first_token = cta.table.begin[w.expert] + range.begin;
    w.tokens = min(tokens - range.begin, range.n);
    w.n = range.n;
    w.m_tile = C::kCluster == ClusterMode::kMulticast ? 2 * m_tile + cta.rank : m_tile;
    w.k_begin = C::kCluster == ClusterMode::kSplitK ? a.k_tiles_per_split * cta.rank : 0;
    w.k_tiles =
        C::kCluster == ClusterMode::kSplitK ? max(0, min(a.k_tiles_per_split, a.k_tiles - w.k_begin)) : a.k_tiles;
    return w;
  }
};

}  // namespace abiding::mxfp8_moe::sm90_mm
