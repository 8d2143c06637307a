// The tiles of rows that a call has, found on the device: each group's rows are cut into tiles, groups in order.
#pragma once

#include "common/warp.cuh"
#include "mxfp8_moe/params.h"

namespace abiding::mxfp8_moe {

// Three arrays of `entries` numbers in a CTA's shared memory.
struct TileTable {
  int entries;
  int* first;         // tiles of the groups before; [count] is the number of all tiles
  int *begin, *rows;  // each group's first row, and its number of rows

  static ABIDING_HD constexpr int entries_for(int64_t groups) { return static_cast<int>(round_up(groups + 1, 32)); }
  static ABIDING_HD constexpr uint32_t bytes(int64_t groups) { return entries_for(groups) * 3 * sizeof(int); }

  __device__ TileTable(void* memory, int64_t groups)
      : entries(entries_for(groups)), first(static_cast<int*>(memory)), begin(first + entries), rows(begin + entries) {}

  // All kThreads threads of the CTA call this; the table is ready when it returns.
  template <int kThreads>
  __device__ __forceinline__ void build(const Groups& groups, int tile_rows) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    __shared__ int warp_sums[kThreads / 32];
    int before = 0;
    for (int from = 0; from < entries; from += kThreads) {
      const int group = from + static_cast<int>(threadIdx.x);
      int tiles = 0;
      if (group < groups.count) {
        const RowRange range = groups.range(group);
        begin[group] = static_cast<int>(range.begin);
        rows[group] = static_cast<int>(range.count);
        tiles = static_cast<int>((range.count + tile_rows - 1) / tile_rows);
      }
      const int sum = inclusive_sum(tiles);
      if (lane == 31) warp_sums[warp] = sum;
      __syncthreads();
      int start = before;
      for (int w = 0; w < kThreads / 32; ++w) {
        if (w < warp) start += warp_sums[w];
        before += warp_sums[w];
      }
      if (group < entries) first[group] = group <= groups.count ? start + sum - tiles : 0x7FFFFFFF;
      __syncthreads();
    }
  }

  // The group of a tile that exists: a two-level search by ballots. All lanes of a warp call this.
  __device__ __forceinline__ int find(int tile) const {
    const int lane = threadIdx.x % 32;
    const int chunk = __popc(__ballot_sync(~0u, lane < entries / 32 && first[lane * 32] <= tile)) - 1;
    return chunk * 32 + __popc(__ballot_sync(~0u, first[chunk * 32 + lane] <= tile)) - 1;
  }
};

}  // namespace abiding::mxfp8_moe
