// What the checks hand to a kernel. No torch here.
#pragma once

#include "common/dtypes.h"
#include "peer/protocol.h"

namespace abiding::reduce_rms {

// One or two tensors that are normalised over their full width, of which each rank holds `width` columns.
constexpr int kMaxParts = 2;
struct Part {
  const void* weight;
  void* out;  // dense
  int64_t width;
  float inverse_full_width;  // 1 / (ranks x width); filled in where a kernel is launched
};

// In the order in which a kernel reads them, since they are fetched a piece at a time.
struct ReduceRmsParams {
  const void* input;     // the parts lie side by side in its rows
  int64_t input_stride;  // elements from row to row
  int64_t tokens;
  int packs[kMaxParts];  // of each part's columns, as a kernel moves them; filled in where it is launched
  float eps;
  DType dtype;
  int part_count;
  alignas(16) Part parts[kMaxParts];
};

// Upstream's workspace, a device array of 3 N + 2 pointers: [2N, 3N) the ranks' buffers, each of three slots whose words are
// -0.0 where empty, the third of no use here; [3N] three counters {blocks that are done, -, epoch}; [3N + 1] two sizes {-, bytes of a slot}.
struct TableParams {
  void* const* pointers;
  int rank, ranks;
  uint64_t timeout_ns;
};

// In such a slot each source has its own part, and in it each token one or two words.
constexpr uint32_t kTableEmpty = 0x80000000;

// A team of warps takes a token, and each thread holds some packs of it, 16 bytes each, in registers. With one pack a token takes
// the least time; with more, a block takes more tokens. 0 packs stand for more than registers hold. Where there is no team for every
// token, each warp takes several, and holds its row in shared memory if `memory` bytes of that have room for enough warps, or else
// reads it twice. All ranks have the same shape, since it depends on sizes alone, and their GPUs are of one kind.
constexpr int kMaxBlockWarps = 32, kMinHoldingWarps = 8;
constexpr int kHeldRow = -1, kReadTwice = -2;  // for packs of a thread, where a warp takes several tokens
struct Shape {
  int packs_a_thread, team, teams;
  constexpr bool streams() const { return packs_a_thread < 0; }
};
constexpr Shape choose_shape(int64_t packs, int64_t tokens, int max_blocks, int64_t memory) {
  const int64_t wanted = tokens > max_blocks ? (tokens + max_blocks - 1) / max_blocks : 1;
  for (const int each : {1, 2, 4}) {
    const int64_t team = packs > 32 * each ? (packs + 32 * each - 1) / (32 * each) : 1;
    if (wanted * team <= kMaxBlockWarps) return {each, static_cast<int>(team), static_cast<int>(wanted)};
  }
  if (wanted == 1) return {0, kMaxBlockWarps, 1};
  const int warps = wanted < kMaxBlockWarps ? static_cast<int>(wanted) : kMaxBlockWarps;
  if (packs * 16 * warps <= memory) return {kHeldRow, 1, warps};
  const int64_t held = memory / (packs * 16);
  return held >= kMinHoldingWarps ? Shape{kHeldRow, 1, static_cast<int>(held)} : Shape{kReadTwice, 1, warps};
}
constexpr bool is_shape(const Shape& shape, int packs_a_thread, int team, int teams) {
  return shape.packs_a_thread == packs_a_thread && shape.team == team && shape.teams == teams;
}
constexpr int64_t kMemory = 227 << 10;
static_assert(is_shape(choose_shape(448, 1, 128, kMemory), 1, 14, 1) &&
              is_shape(choose_shape(448, 256, 128, kMemory), 1, 14, 2) &&
              is_shape(choose_shape(448, 1024, 128, kMemory), 4, 4, 8) &&
              is_shape(choose_shape(448, 2048, 128, kMemory), kHeldRow, 1, 16) &&
              is_shape(choose_shape(448, 9999, 128, kMemory), kHeldRow, 1, 32) &&
              is_shape(choose_shape(1000, 9999, 128, kMemory), kHeldRow, 1, 14) &&
              is_shape(choose_shape(2000, 9999, 128, kMemory), kReadTwice, 1, 32) &&
              is_shape(choose_shape(2000, 256, 128, kMemory), 4, 16, 2) &&
              is_shape(choose_shape(4097, 1, 128, kMemory), 0, 32, 1) &&
              is_shape(choose_shape(3, 9999, 128, kMemory), kHeldRow, 1, 32) &&
              is_shape(choose_shape(0, 1, 1, kMemory), 1, 1, 1));

// A block's share has room for the words of all its teams.
static_assert(peer::share_bytes(peer::kScalars, peer::kMaxRanks, peer::kMaxBlocks) >=
              kMaxBlockWarps * kMaxParts * static_cast<int64_t>(sizeof(float)));

}  // namespace abiding::reduce_rms
