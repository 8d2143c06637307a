// How the sm_90 grouped GEMM is tiled: the choice of a tile shape and of a cluster size, and how an expert's tokens are
// divided among its tiles. Pure functions of sizes, tested on a host.
#pragma once

#include "mxfp8_moe/params.h"

namespace abiding::mxfp8_moe {

// CTA tiles, by how many tokens an expert has. M is weight rows and N is tokens (swap-AB: wgmma's M is always 64 and N
// goes down to 8, and decode has few tokens). Names: most tokens (N), weight rows if not 128 (M256). kN32 and kN64, and
// kStreamK_N16 beside bf16 tokens, run two CTAs per SM. Cluster2 pairs CTAs that share their tokens by TMA multicast.
// kN32, kN160_Cluster2 and kN256_Cluster2 are for bf16 tokens, kN192_Cluster2 for e4m3 tokens.
enum class TileShape { kStreamK_N16, kN32, kN64, kM256_N128, kN160_Cluster2, kN192_Cluster2, kN256_Cluster2 };

ABIDING_HD constexpr int max_tokens(TileShape shape) {
  constexpr int tokens[] = {16, 32, 64, 128, 160, 192, 256};
  return tokens[static_cast<int>(shape)];
}

// A tile's N is a multiple of this.
ABIDING_HD constexpr int tile_step(TileShape shape) {
  return max_tokens(shape) <= 32 ? 8 : max_tokens(shape) <= 64 ? 16 : 32;
}

constexpr int kStreamKBlockM = 128;  // weight rows of a kStreamK_N16 tile
constexpr int kStreamKBlockK = 128;  // K of one of its K tiles

// The most experts whose tile table has room beside the stages; of kN32, in two CTAs per SM.
constexpr int max_experts(RowFormat format, TileShape shape) {
  if (format == RowFormat::kE4m3) return kMaxExperts;
  return shape == TileShape::kN32 ? 479 : shape == TileShape::kM256_N128 ? 512 : kMaxExperts;
}

struct Plan {
  TileShape shape;
  int cluster;  // CTAs that divide the K tiles of a cluster's tiles; more than 1 for kStreamK_N16 alone
};

// The cluster size of stream-K for about `tiles` tiles of `k_tiles` K tiles each, on `ctas` resident CTAs. Costs are in
// the time of a K tile. A cluster has whole tiles, so on average its CTAs wait half a tile, divided by their number,
// for the busiest cluster. A larger cluster hands more accumulators over: kHandover per doubling. It has to fit into a
// GPC: on an H200, clusters of 4 and 8 leave 6 and 9 % of the SMs idle, which takes kIdle of the work. The number of
// tiles is an estimate, so the expected wait counts, and not the wait that this very number would give. The constants
// fit times of an H200, from 1 to 64 tokens.
constexpr int choose_cluster(int64_t tiles, int64_t k_tiles, int64_t ctas) {
  constexpr double kHandover = 2.5, kIdle[] = {0, 0, 0.04, 0.06};
  int best = 1;
  double best_cost = 0;
  for (int cluster = 1, doublings = 0; cluster <= 8; cluster *= 2, ++doublings) {
    const double work = static_cast<double>(tiles * k_tiles) / static_cast<double>(ctas);
    const double wait = 0.5 * static_cast<double>(k_tiles) / cluster;
    const double cost = work * (1 + kIdle[doublings]) + wait + kHandover * doublings;
    if (cluster == 1 || cost < best_cost) best = cluster, best_cost = cost;
  }
  return best;
}

// `rows` is the number of rows that this rank is expected to have, of `experts` experts; how they are spread is known
// on the device alone. `ctas` of kStreamK_N16 are resident at once.
constexpr Plan choose_plan(RowFormat format, int64_t rows, int64_t experts, int64_t n, int64_t k, int ctas) {
  if (rows < 1 || experts < 1 || ctas < 1) return {TileShape::kN64, 1};
  const int64_t busy_experts = rows < experts ? rows : experts, tokens_per_expert = rows / busy_experts;
  if (tokens_per_expert > 40 && format == RowFormat::kE4m3) {
    // Measured: kM256_N128 is faster for few rows, and from about one full tile of kN192_Cluster2 on to two that are
    // not quite full.
    const bool two_narrow_tiles = tokens_per_expert > 180 && tokens_per_expert <= 320;
    return {tokens_per_expert <= 105 || two_narrow_tiles ? TileShape::kM256_N128 : TileShape::kN192_Cluster2, 1};
  }
  if (tokens_per_expert > 132) return {TileShape::kN256_Cluster2, 1};
  if (tokens_per_expert > 40) {
    const bool tall = tokens_per_expert <= 105 && experts <= max_experts(format, TileShape::kM256_N128);
    return {tall ? TileShape::kM256_N128 : TileShape::kN160_Cluster2, 1};
  }
  if (tokens_per_expert >= 5) {
    const bool narrow =
        tokens_per_expert <= 12 && experts <= max_experts(format, TileShape::kN32) && format != RowFormat::kE4m3;
    return {narrow ? TileShape::kN32 : TileShape::kN64, 1};
  }
  const int64_t tiles = busy_experts * ((n + kStreamKBlockM - 1) / kStreamKBlockM);
  return {TileShape::kStreamK_N16, choose_cluster(tiles, (k + kStreamKBlockK - 1) / kStreamKBlockK, ctas)};
}

// The tokens of an expert that one of its tiles takes.
struct TokenRange {
  int begin, n;  // n is a multiple of the step and may reach beyond the last token
};
// Steps are divided among an expert's tiles as evenly as they allow: 161 tokens are 96 + 96, not 160 + 32.
ABIDING_HD constexpr TokenRange token_range(int tokens, int step, int tiles, int tile) {
  const int steps = (tokens + step - 1) / step;
  if (tiles == 1) return {0, steps * step};  // mostly; divisions take long on a GPU
  const int per_tile = steps / tiles, rest = steps - per_tile * tiles;
  return {(tile * per_tile + (tile < rest ? tile : rest)) * step, (per_tile + (tile < rest)) * step};
}

}  // namespace abiding::mxfp8_moe
