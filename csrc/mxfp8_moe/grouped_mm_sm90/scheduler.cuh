// The sm_90 grouped GEMM: the persistent tile scheduler. Clusters take the tiles round robin; every role of a CTA walks
// the same sequence.
#pragma once

#include "mxfp8_moe/grouped_mm_sm90/config.cuh"

namespace abiding::mxfp8_moe::sm90_mm {

// A CTA tile, or a part of one along K: some weight rows of an expert x some of its tokens.
struct WorkTile {
  int expert, m_tile;
  int first_token;       // its row in the tensors
  int tokens;            // that exist, at most n
  int n;                 // the tile's width, a multiple of kTileStep
  int k_begin, k_tiles;  // in kBlockK
};

// With kStreamK the K tiles of all tiles of a cluster are one sequence, of which each CTA has an equal run, in the
// order of the CTAs' ranks in the cluster. So a CTA's first and last work tile may be parts of a tile.
// Invariant: a part that does not end its tile is continued by the CTA of the next rank, as the first thing that this
// CTA does. It hands its accumulators to the rank below, which adds them to those of its own last part. So nobody waits
// unless a tile has more than two parts, and the order of a sum follows from sizes and group offsets alone.
template <class C>
struct Scheduler {
  static constexpr bool kStreamK = C::kCluster == ClusterMode::kStreamK;
  const Cta<C>& cta;
  int position;  // kStreamK: K tiles in the cluster's sequence; else: tiles
  // kStreamK alone. Otherwise tiles() is read again from shared memory each time, to save a register in the mainloop.
  int end = 0;

  __device__ __forceinline__ explicit Scheduler(const Cta<C>& cta) : cta(cta) {
    if constexpr (kStreamK) {
      const int size = cta.a.cluster_size, rank = static_cast<int>(cta.cluster_rank);
      const int own_tiles = max(0, (tiles() - cluster() + clusters() - 1) / clusters());
      const int k_tiles = own_tiles * cta.a.k_tiles, per_cta = k_tiles / size, rest = k_tiles - per_cta * size;
      position = rank * per_cta + min(rank, rest);
      end = position + per_cta + (rank < rest);
    } else {
      position = cluster();
    }
  }

  __device__ __forceinline__ int cluster() const {
    return C::kCluster == ClusterMode::kNone ? blockIdx.x : blockIdx.x / cta.a.cluster_size;
  }
  __device__ __forceinline__ int clusters() const {
    return C::kCluster == ClusterMode::kNone ? gridDim.x : gridDim.x / cta.a.cluster_size;
  }
  __device__ __forceinline__ int tiles() const { return cta.table.first[cta.a.p.groups.count] * cta.a.m_tiles; }
  __device__ __forceinline__ bool done() const { return position >= (kStreamK ? end : tiles()); }

  __device__ __forceinline__ void advance(const WorkTile& w) { position += kStreamK ? w.k_tiles : clusters(); }

  // The work tile at the position. All lanes of a warp call this. Tiles of the same weight rows are neighbors, so that
  // these rows are read from L2.
  __device__ __forceinline__ WorkTile tile() const {
    const KernelParams& a = cta.a;
    const int turn = kStreamK ? position / a.k_tiles : 0;
    const int index = kStreamK ? cluster() + turn * clusters() : position;
    WorkTile w;
    w.expert = cta.table.find(index / a.m_tiles);
    const int local = index - cta.table.first[w.expert] * a.m_tiles;
    const int n_tiles = cta.table.first[w.expert + 1] - cta.table.first[w.expert];
    const int m_tile = n_tiles == 1 ? local : local / n_tiles, tokens = cta.table.rows[w.expert];
    const TokenRange range = token_range(tokens, C::kTileStep, n_tiles, local - m_tile * n_tiles);
    w.first_token = cta.table.begin[w.expert] + range.begin;
    w.tokens = min(tokens - range.begin, range.n);
    w.n = range.n;
    w.m_tile = C::kCluster == ClusterMode::kMulticast ? 2 * m_tile + cta.cluster_rank : m_tile;
    w.k_begin = kStreamK ? position - turn * a.k_tiles : 0;
    w.k_tiles = kStreamK ? min(a.k_tiles - w.k_begin, end - position) : a.k_tiles;
    return w;
  }
};

}  // namespace abiding::mxfp8_moe::sm90_mm
