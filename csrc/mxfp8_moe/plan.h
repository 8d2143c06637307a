// How the sm_90 grouped GEMM is tiled: the choice of a tile shape, and how an expert's tokens are divided among its tiles. Pure
// functions of sizes, tested on a host.
#pragma once

#include "mxfp8_moe/params.h"

namespace abiding::mxfp8_moe {

// CTA tiles, by how many tokens an expert has. M is weight rows and N is tokens (swap-AB: wgmma's M is always 64 and N goes down
// to 8, and decode has few tokens), so a shape is named by the most tokens it takes. kM256 has 256 weight rows, the others
// 128; Cluster2 pairs CTAs that share their tokens by TMA multicast.
enum class TileShape { kSplitK_N16, kN64, kN64_2Ctas, kM256_N128, kN160_Cluster2, kN256_Cluster2 };

constexpr int max_tokens(TileShape shape) {
  constexpr int tokens[] = {16, 64, 64, 128, 160, 256};
  return tokens[static_cast<int>(shape)];
}

constexpr int kDecodeBlockM = 128;  // weight rows of a tile of the three shapes with few tokens
constexpr int kMaxSplits = 8;
constexpr int kM256MaxExperts = 512;  // whose tile table fits beside the stages of kM256_N128
constexpr int kSms = 132;             // of an H100 or H200; others get the same results, perhaps with worse balance

struct Plan {
  TileShape shape;
  int splits;  // CTAs that share K; more than 1 for kSplitK_N16 alone
};

// `rows` is the number of rows in the tensors: how they are spread over experts is known on the device alone.
constexpr Plan choose_plan(int64_t rows, int64_t experts, int64_t n, int64_t k) {
  if (rows < 1 || experts < 1) return {TileShape::kN64, 1};
  const int64_t busy_experts = rows < experts ? rows : experts, tokens_per_expert = rows / busy_experts;
  if (tokens_per_expert > 140) return {TileShape::kN256_Cluster2, 1};
  if (tokens_per_expert > 105) return {TileShape::kN160_Cluster2, 1};
  if (tokens_per_expert > 40) return {experts > kM256MaxExperts ? TileShape::kN160_Cluster2 : TileShape::kM256_N128, 1};
  const int64_t tiles = busy_experts * ((n + kDecodeBlockM - 1) / kDecodeBlockM);
  int splits = 1;
  if (tokens_per_expert <= 4) {
    // Split K while there are fewer tiles than SMs. Long tiles of a few waves are split too, to shorten the last wave.
    while (splits < kMaxSplits && tiles * splits < 96 && k / (2 * splits) >= 512) splits *= 2;
    if (n >= 4096 && k >= 3072 && tiles > 3 * kSms && tiles < 8 * kSms) splits = 2;
  }
  if (splits > 1) return {TileShape::kSplitK_N16, splits};
  // Wave quantization: a second wave that would leave SMs idle runs beside the first, two CTAs per SM. Two nearly full waves
  // are faster one after the other.
  if (tiles > kSms && tiles < 2 * kSms - 8) return {TileShape::kN64_2Ctas, 1};
  // Where the epilogue is a large part of a tile (many tokens, or a short K), one CTA's epilogue overlaps the other's mainloop.
  if (tokens_per_expert >= 16 || (tokens_per_expert >= 8 && k <= 2048)) return {TileShape::kN64_2Ctas, 1};
  return {TileShape::kN64, 1};
}

// Rows (tokens) of one TMA box. A tile's N is a whole number of boxes.
ABIDING_HD constexpr int tma_box_rows(int max_tokens) { return max_tokens > 64 ? 32 : 16; }

// The tokens of an expert that one of its tiles takes.
struct TokenRange {
  int begin, n;  // n is a multiple of the box and may reach beyond the last token
};
// Boxes are divided among an expert's tiles as evenly as they allow: 161 tokens are 96 + 96, not 160 + 32.
ABIDING_HD constexpr TokenRange token_range(int tokens, int box_rows, int tiles, int tile) {
  const int boxes = (tokens + box_rows - 1) / box_rows, per_tile = boxes / tiles, rest = boxes - per_tile * tiles;
  return {(tile * per_tile + (tile < rest ? tile : rest)) * box_rows, (per_tile + (tile < rest)) * box_rows};
}

}  // namespace abiding::mxfp8_moe
