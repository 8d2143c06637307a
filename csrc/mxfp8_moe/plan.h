// How a grouped product on Hopper is cut up, from sizes alone.
#pragma once

#include "mxfp8_moe/params.h"

namespace abiding::mxfp8_moe {

// Tiles for few tokens an expert, some, and many: their most tokens.
enum class TileKind { kFew = 16, kSome = 64, kMany = 224 };

constexpr int kWeightRows = 128;  // of a tile
constexpr int kMaxSplits = 8;

struct Plan {
  TileKind kind;
  int splits;  // blocks that share K, of kFew alone
};

// `rows` are those of the tensors: what the device will find in them is not known here.
constexpr Plan choose_plan(int64_t rows, int64_t experts, int64_t n, int64_t k) {
  const int64_t busy = rows < experts ? rows : experts, average = rows / busy;
  if (average > 40) return {TileKind::kMany, 1};
  if (average > 4) return {TileKind::kSome, 1};
  // Parts of K, so that few tiles keep many multiprocessors busy.
  const int64_t tiles = busy * ((n + kWeightRows - 1) / kWeightRows);
  int splits = 1;
  while (splits < kMaxSplits && tiles * splits < 96 && k / (2 * splits) >= 512) splits *= 2;
  return {TileKind::kFew, splits};
}

// Tokens are copied a box at a time, and a tile has whole boxes.
ABIDING_HD constexpr int box_of(int most_tokens) { return most_tokens > 64 ? 32 : 16; }

// Which tokens of an expert one of its tiles has: boxes are shared out as evenly as they allow.
struct Share {
  int begin, width;
};
ABIDING_HD constexpr Share share_of(int tokens, int box, int tiles, int tile) {
  const int boxes = (tokens + box - 1) / box, each = boxes / tiles, more = boxes - each * tiles;
  return {(tile * each + (tile < more ? tile : more)) * box, (each + (tile < more)) * box};
}

}  // namespace abiding::mxfp8_moe
