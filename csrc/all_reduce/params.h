// What the checks hand to a kernel. No torch here.
#pragma once

#include "common/dtypes.h"
#include "peer/protocol.h"

namespace abiding::all_reduce {

struct AllReduceParams {
  const void* input;
  void* out;  // may be `input`
  int64_t numel;
  DType dtype;
};

// Every rank sends the whole message to every other, or each rank adds up one part and sends the sum back: (N - 1) * S bytes
// leave a rank in one hop, or 2 * (N - 1) / N * S in two.
enum class Algorithm { kOneShot, kTwoShot };

// Up to how many bytes one hop is taken, a row for up to so many ranks; `make multi-gpu` prints what it should say. For 2 ranks
// both algorithms send the same bytes, but in two-shot each rank adds up half of them and reads its message once.
struct OneShotLimit {
  int ranks;
  int64_t bytes;
};
constexpr OneShotLimit kOneShotLimits[] = {{2, 2 << 20}, {4, 256 << 10}, {peer::kMaxRanks, 128 << 10}};

constexpr int64_t one_shot_bytes(int ranks) {
  for (const OneShotLimit& limit : kOneShotLimits)
    if (ranks <= limit.ranks) return limit.bytes;
  return 0;
}
static_assert(one_shot_bytes(1) == 2 << 20 && one_shot_bytes(3) == one_shot_bytes(4) &&
              one_shot_bytes(peer::kMaxRanks) == 128 << 10);

// A negative `limit` stands for the table's.
constexpr Algorithm choose_algorithm(int ranks, int64_t bytes, int64_t limit) {
  return bytes <= (limit < 0 ? one_shot_bytes(ranks) : limit) ? Algorithm::kOneShot : Algorithm::kTwoShot;
}

// The most bytes that one call of the protocol moves; longer messages take several.
constexpr int64_t capacity(Algorithm algorithm, int ranks, int max_blocks) {
  const int64_t direct = peer::share_bytes(peer::kDirect, ranks, max_blocks) * max_blocks;
  return algorithm == Algorithm::kOneShot ? direct : direct * ranks;
}

// Blocks and threads for a run of packs, at least one, `each` to a block: as many blocks as may be taken and fill four warps,
// then a pack a thread while that lasts. Blocks begin where a line of the caches does.
constexpr int kPacksALine = 8;
struct Shape {
  unsigned blocks, threads;
  int each;
};
constexpr Shape choose_shape(int64_t packs, int max_blocks, unsigned max_threads) {
  const int64_t filled = (packs + 127) / 128, most = filled < max_blocks ? filled : max_blocks;
  const int64_t each = round_up((packs + most - 1) / most, kPacksALine), threads = round_up(each, 128);
  return {static_cast<unsigned>((packs + each - 1) / each),
          threads < max_threads ? static_cast<unsigned>(threads) : max_threads, static_cast<int>(each)};
}

// No block gets more than its share, whatever the size of the message.
constexpr bool shares_suffice(int ranks, int max_blocks) {
  const int64_t share = peer::share_bytes(peer::kDirect, ranks, max_blocks) / 16;
  for (int64_t packs = 1; packs <= share * max_blocks; packs += packs / 8 + 1) {
    const Shape shape = choose_shape(packs, max_blocks, 1024);
    if (shape.each > share || static_cast<int>(shape.blocks) > max_blocks) return false;
  }
  return choose_shape(share * max_blocks, max_blocks, 1024).each <= share;
}
static_assert(shares_suffice(2, peer::kMaxBlocks) && shares_suffice(3, peer::kMaxBlocks) && shares_suffice(2, 64) &&
              shares_suffice(4, 32) && shares_suffice(8, 16) && shares_suffice(peer::kMaxRanks, peer::kMaxBlocks) &&
              shares_suffice(peer::kMaxRanks, 1));

}  // namespace abiding::all_reduce
