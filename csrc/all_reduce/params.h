// What the checks hand to a kernel. No torch here.
#pragma once

#include "peer/protocol.h"

namespace abiding::all_reduce {

using peer::Type;

struct AllReduceParams {
  const void* input;
  void* out;  // may be `input`
  int64_t numel;
  Type type;
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
constexpr OneShotLimit kOneShotLimits[] = {{2, 2 << 20}, {4, 384 << 10}, {peer::kMaxRanks, 128 << 10}};

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

// Blocks and threads for a run of packs, `each` to a block: a pack a thread while that lasts, on as many multiprocessors as may
// be taken.
struct Shape {
  unsigned blocks, threads;
  int each;
};
constexpr Shape choose_shape(int64_t packs, int max_blocks, unsigned max_threads) {
  unsigned threads = 128;
  while (threads < max_threads && packs > int64_t{threads} * max_blocks) threads *= 2;
  const int64_t wanted = (packs + threads - 1) / threads;
  const int64_t blocks = wanted < 1 ? 1 : wanted < max_blocks ? wanted : max_blocks;
  return {static_cast<unsigned>(blocks), threads, static_cast<int>((packs + blocks - 1) / blocks)};
}

// No block gets more than its share, whatever the size of the message.
constexpr bool shares_suffice(int ranks, int max_blocks) {
  const int64_t share = peer::share_bytes(peer::kDirect, ranks, max_blocks) / 16;
  for (int64_t packs = 1; packs <= share * max_blocks; packs += packs / 8 + 1)
    for (unsigned threads = 128; threads <= 1024; threads *= 2)
      if (choose_shape(packs, max_blocks, threads).each > share) return false;
  return true;
}
static_assert(shares_suffice(2, peer::kMaxBlocks) && shares_suffice(3, peer::kMaxBlocks) && shares_suffice(2, 64) &&
              shares_suffice(4, 32) && shares_suffice(8, 16) && shares_suffice(peer::kMaxRanks, peer::kMaxBlocks) &&
              shares_suffice(peer::kMaxRanks, 1));

}  // namespace abiding::all_reduce
