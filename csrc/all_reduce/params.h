// What the checks hand to a kernel. No torch here.
#pragma once

#include "common/dtypes.h"
#include "peer/protocol.h"

namespace abiding::all_reduce {

// One-shot: every rank sends the whole message to every other rank and sums all of it; (N - 1) * S bytes leave a rank
// in one hop. Two-shot: reduce-scatter, then all-gather; 2 * (N - 1) / N * S bytes leave a rank in two hops.
enum class Algorithm { kOneShot, kTwoShot };

struct AllReduceParams {
  const void* input;
  void* out;  // may be `input`
  int64_t numel;
  DType dtype;
  Algorithm algorithm;  // the CPU is always one-shot
};

// Up to how many bytes one-shot is taken, a row for up to so many ranks; `make multi-gpu` prints what it should say.
// For 2 ranks both algorithms send the same bytes, but in two-shot each rank sums half of them and reads its message
// once.
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

// The most bytes that one kernel moves.
constexpr int64_t capacity(Algorithm algorithm, int ranks, int max_ctas) {
  const int64_t direct = peer::region_bytes(peer::kDirect, ranks, max_ctas) * max_ctas;
  return algorithm == Algorithm::kOneShot ? direct : direct * ranks;
}

// How a kernel's 16-byte vectors, at least one, are split into CTAs: as many CTAs as are allowed and have four full
// warps, then one vector per thread as long as threads last. CTAs begin at multiples of 128 bytes, a cache line.
constexpr int kVectorsPerCacheLine = 8;
struct GridShape {
  unsigned ctas, threads;
  int vectors_per_cta;
};
constexpr GridShape choose_grid_shape(int64_t vectors, int max_ctas, unsigned max_threads) {
  const int64_t full_ctas = (vectors + 127) / 128, ctas = full_ctas < max_ctas ? full_ctas : max_ctas;
  const int64_t per_cta = round_up((vectors + ctas - 1) / ctas, kVectorsPerCacheLine), threads = round_up(per_cta, 128);
  return {static_cast<unsigned>((vectors + per_cta - 1) / per_cta),
          threads < max_threads ? static_cast<unsigned>(threads) : max_threads, static_cast<int>(per_cta)};
}

// Invariant: no CTA gets more than its region holds, whatever the size of the message.
constexpr bool regions_suffice(int ranks, int max_ctas) {
  const int64_t region = peer::region_bytes(peer::kDirect, ranks, max_ctas) / 16;
  for (int64_t vectors = 1; vectors <= region * max_ctas; vectors += vectors / 8 + 1) {
    const GridShape shape = choose_grid_shape(vectors, max_ctas, 1024);
    if (shape.vectors_per_cta > region || static_cast<int>(shape.ctas) > max_ctas) return false;
  }
  return choose_grid_shape(region * max_ctas, max_ctas, 1024).vectors_per_cta <= region;
}
static_assert(regions_suffice(2, peer::kMaxCtas) && regions_suffice(3, peer::kMaxCtas) && regions_suffice(2, 64) &&
              regions_suffice(4, 32) && regions_suffice(8, 16) && regions_suffice(peer::kMaxRanks, peer::kMaxCtas) &&
              regions_suffice(peer::kMaxRanks, 1));

}  // namespace abiding::all_reduce
