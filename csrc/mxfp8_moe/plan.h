// How a grouped product on Hopper is cut up, from sizes alone.
#pragma once

#include "mxfp8_moe/params.h"

namespace abiding::mxfp8_moe {

// By how many tokens an expert has: so few that K is split, few, some, more, many. kFewTwice has two blocks to a
// multiprocessor.
enum class TileKind { kSplit, kFew, kFewTwice, kSome, kMore, kMany };

// The most of a tile.
constexpr int tokens_of(TileKind kind) {
  constexpr int most[] = {16, 64, 64, 128, 160, 256};
  return most[static_cast<int>(kind)];
}

constexpr int kWeightRows = 128;  // of a tile of few tokens
constexpr int kMaxSplits = 8;
constexpr int kSomeExperts = 512;      // whose table fits beside tiles of kSome
constexpr int kMultiprocessors = 132;  // of an H100 or H200; on others, the same results a little later

struct Plan {
  TileKind kind;
  int splits;  // blocks that share K, of kSplit alone
};

// `rows` are those of the tensors: what the device will find in them is not known here.
constexpr Plan choose_plan(int64_t rows, int64_t experts, int64_t n, int64_t k) {
  const int64_t busy = rows < experts ? rows : experts, average = rows / busy;
  if (average > 140) return {TileKind::kMany, 1};
  if (average > 105) return {TileKind::kMore, 1};
  if (average > 40) return {experts > kSomeExperts ? TileKind::kMore : TileKind::kSome, 1};
  const int64_t tiles = busy * ((n + kWeightRows - 1) / kWeightRows);
  int splits = 1;
  if (average <= 4) {
    // Parts of K, so that few tiles keep many multiprocessors busy, and so that the last of some long ones do.
    while (splits < kMaxSplits && tiles * splits < 96 && k / (2 * splits) >= 512) splits *= 2;
    if (n >= 4096 && k >= 3072 && tiles > 3 * kMultiprocessors && tiles < 8 * kMultiprocessors) splits = 2;
  }
  if (splits > 1) return {TileKind::kSplit, splits};
  // Tiles that a second round of blocks would be short of; two rounds that are nearly full are better one after the other.
  if (tiles > kMultiprocessors && tiles < 2 * kMultiprocessors - 8) return {TileKind::kFewTwice, 1};
  // Results of many tokens, or after a short K: one block stores them while the other multiplies.
  if (average >= 16 || (average >= 8 && k <= 2048)) return {TileKind::kFewTwice, 1};
  return {TileKind::kFew, 1};
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
