// What the checks hand to a kernel. No torch here.
#pragma once

#include "peer/protocol.h"

namespace abiding::reduce_rms {

using peer::Type;

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
  Type type;
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
// the least time; with more, all its warps together execute fewer instructions, which counts where tokens are many. 0 packs
// stand for more than registers hold. `once`: there is a team for every token. All ranks have the same shape, since it depends
// on sizes alone.
constexpr int kMaxBlockWarps = 32, kMaxTeams = 15;  // a block has 16 barriers, one is its own
struct Shape {
  int packs_a_thread, team, teams;
  bool once;
};
constexpr Shape choose_shape(int64_t packs, int64_t tokens, int max_blocks) {
  const int64_t wanted = tokens > max_blocks ? (tokens + max_blocks - 1) / max_blocks : 1;
  Shape shape{0, kMaxBlockWarps, 1, false};
  for (const int each : {1, 2, 4}) {
    const int64_t team = packs > 32 * each ? (packs + 32 * each - 1) / (32 * each) : 1;
    if (team > kMaxBlockWarps) continue;
    const int64_t most = team == 1                           ? kMaxBlockWarps
                         : kMaxBlockWarps / team < kMaxTeams ? kMaxBlockWarps / team
                                                             : kMaxTeams;
    shape = {each, static_cast<int>(team), static_cast<int>(wanted < most ? wanted : most), wanted <= most};
    if (shape.once) break;
  }
  return shape;
}
constexpr bool is_shape(const Shape& shape, int packs_a_thread, int team, int teams, bool once) {
  return shape.packs_a_thread == packs_a_thread && shape.team == team && shape.teams == teams && shape.once == once;
}
static_assert(is_shape(choose_shape(448, 1, 128), 1, 14, 1, true) &&
              is_shape(choose_shape(448, 256, 128), 1, 14, 2, true) &&
              is_shape(choose_shape(448, 1024, 128), 4, 4, 8, true) &&
              is_shape(choose_shape(448, 2048, 128), 4, 4, 8, false) &&
              is_shape(choose_shape(4097, 1, 128), 0, 32, 1, false) &&
              is_shape(choose_shape(3, 4097, 128), 4, 1, 32, false) && is_shape(choose_shape(0, 1, 1), 1, 1, 1, true));

// Tokens that one call of the protocol can take. A block's share has 8 bytes for each of its tokens, counted in whole rounds of
// its teams.
constexpr int64_t capacity(int ranks, int max_blocks) {
  return (peer::share_bytes(peer::kScalars, ranks, max_blocks) / 8 - (kMaxBlockWarps - 1)) * max_blocks;
}

constexpr bool capacity_fits(int ranks, int max_blocks) {
  for (int64_t teams = 1; teams <= kMaxBlockWarps; ++teams) {
    const int64_t at_once = teams * max_blocks;
    const int64_t rounds = (capacity(ranks, max_blocks) + at_once - 1) / at_once;
    if (rounds * teams * 8 > peer::share_bytes(peer::kScalars, ranks, max_blocks)) return false;
  }
  return true;
}
constexpr bool capacity_fits() {
  for (int ranks = 1; ranks <= peer::kMaxRanks; ++ranks)
    for (int blocks = 1; blocks <= peer::kMaxBlocks; ++blocks)
      if (!capacity_fits(ranks, blocks)) return false;
  return true;
}
static_assert(capacity_fits());

}  // namespace abiding::reduce_rms
