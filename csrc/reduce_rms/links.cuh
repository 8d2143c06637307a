// What a token's sums of squares go over from rank to rank, and come back by.
#pragma once

#include <limits>
#include <type_traits>

#include "peer/device.cuh"
#include "reduce_rms/params.h"

namespace abiding::reduce_rms {

using peer::Peers;
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

// A token's sum of squares travels as one word, and as two words where it has two parts. Lane l of a warp has part l / 16
// and exchanges it with rank l % 16.
static_assert(peer::kMaxRanks == 16);
struct Lane {
  int part, rank;
  __device__ __forceinline__ explicit Lane(unsigned lane)
      : part(static_cast<int>(lane / 16)), rank(static_cast<int>(lane % 16)) {}
};

// Exchange over a communicator's workspaces.
template <int kParts>
class WorkspaceLink {
 public:
  __device__ __forceinline__ WorkspaceLink(const Peers& peers, Lane lane)
      : peers_(peers),
        lane_(lane),
        turn_(peers, peer::kScalars, kParts == 2 ? peer::Op::kQkNorm : peer::Op::kRmsNorm) {}
  __device__ __forceinline__ int ranks() const { return peers_.ranks; }
  __device__ __forceinline__ void begin() { turn_.begin(); }

  // Where the words of the block's token `index` lie in even epochs. It takes a while, in which what was loaded arrives.
  __device__ __forceinline__ void find_places(int index) {
    const int other = exchanges() ? lane_.rank : peers_.rank;  // lanes that exchange nothing have places too, unused
    const int distance = other >= peers_.rank ? other - peers_.rank : other - peers_.rank + peers_.ranks;
    const int word = index * kParts + lane_.part;
    to_ = turn_.template even_place<uint32_t>(peer::kScalars, distance, peers_.rank) + word;
    from_ = turn_.template even_place<uint32_t>(peer::kScalars, 0, other) + word;
    asm volatile("" : "+l"(to_), "+l"(from_));
  }
  __device__ __forceinline__ void go_to_epoch() {
    to_ += turn_.slot() / static_cast<int64_t>(sizeof *to_);
    from_ += turn_.slot() / static_cast<int64_t>(sizeof *from_);
    asm volatile("" : "+l"(to_), "+l"(from_));
  }
  // So many of the block's tokens on.
  __device__ __forceinline__ void advance(int tokens) {
    to_ += tokens * kParts;
    from_ += tokens * kParts;
  }

  // The sum of rank l % 16, 0 where there is none such; `own` is that of this rank.
  __device__ __forceinline__ float exchange(int64_t /*token*/, float own) {
    if (!turn_.ok()) return kNan;
    if (!exchanges()) return lane_.rank == peers_.rank ? own : 0.0f;
    peer::store_volatile(to_, peer::encode(__float_as_uint(own)));
    uint32_t word[] = {peer::load_volatile(from_)};
    const bool ok = turn_.receive(word, lane_.rank, [](int) { return true; }, [&](int) { return from_; });
    return ok ? __uint_as_float(peer::decode(word[0])) : kNan;
  }
  __device__ __forceinline__ void end() { turn_.end(); }

 private:
  __device__ __forceinline__ bool exchanges() const {
    return lane_.rank != peers_.rank && lane_.rank < peers_.ranks && lane_.part < kParts;
  }

  const Peers& peers_;
  Lane lane_;
  peer::Turn turn_;
  uint32_t *to_ = nullptr, *from_ = nullptr;
};

// Exchange over upstream's table. It has one epoch for the whole grid, which the last block to finish moves on.
template <int kParts>
class TableLink {
 public:
  __device__ __forceinline__ TableLink(const TableParams& table, Lane lane) : table_(table), lane_(lane) {}
  __device__ __forceinline__ void begin() {
    slot_bytes_ = static_cast<uint32_t>(static_cast<const int64_t*>(table_.pointers[3 * table_.ranks + 1])[1]);
    share_bytes_ = slot_bytes_ / table_.ranks / 16 * 16;
    epoch_ = peer::load_volatile(&counters()[2]);
  }
  __device__ __forceinline__ int ranks() const { return table_.ranks; }
  __device__ __forceinline__ void find_places(int /*index*/) {}
  __device__ __forceinline__ void go_to_epoch() {}
  __device__ __forceinline__ void advance(int /*tokens*/) {}

  __device__ __forceinline__ float exchange(int64_t token, float own) {
    if (lane_.rank >= table_.ranks || lane_.part >= kParts) return 0.0f;
    if (lane_.rank == table_.rank) return own;
    if (gave_up_ || (token + 1) * kParts * static_cast<int64_t>(sizeof own) > share_bytes_)
      return kNan;  // the table may have been made for fewer tokens
    const int64_t at = token * kParts + lane_.part;
    peer::store_volatile(place(lane_.rank, table_.rank) + at, peer::encode(__float_as_uint(own)) ^ kTableEmpty);
    uint32_t* from = place(table_.rank, lane_.rank) + at;
    uint32_t word = peer::load_volatile(from);
    uint64_t since = 0;
    for (int polls = peer::kPolls; word == kTableEmpty;) {
      if (--polls == 0) {
        polls = peer::kPolls;
        const uint64_t now = peer::now_ns();
        if (since == 0) since = now;
        if (now - since > table_.timeout_ns) {
          gave_up_ = true;
          return kNan;
        }
      }
      word = peer::load_volatile(from);
    }
    peer::store_volatile(from, kTableEmpty);
    return __uint_as_float(peer::decode(word ^ kTableEmpty));
  }

  __device__ __forceinline__ void end() {
    __syncthreads();
    if (!peer::leads_block() || atomicAdd(&counters()[0], 1u) != gridDim.x - 1) return;
    peer::store_volatile(&counters()[0], 0u);
    peer::store_volatile(&counters()[2], epoch_ + 1);
  }

 private:
  __device__ __forceinline__ uint32_t* place(int receiver, int source) const {
    auto* buffer = static_cast<uint8_t*>(table_.pointers[2 * table_.ranks + receiver]);
    return reinterpret_cast<uint32_t*>(buffer + epoch_ % peer::kSlots * slot_bytes_ + source * share_bytes_);
  }
  __device__ __forceinline__ uint32_t* counters() const {
    return static_cast<uint32_t*>(table_.pointers[3 * table_.ranks]);
  }

  const TableParams& table_;
  Lane lane_;
  uint32_t slot_bytes_ = 0, share_bytes_ = 0, epoch_ = 0;
  bool gave_up_ = false;
};

// What a kernel that is given `Peer`, Peers or TableParams, exchanges over.
template <class Peer, int kParts>
using LinkOver = std::conditional_t<std::is_same_v<Peer, Peers>, WorkspaceLink<kParts>, TableLink<kParts>>;

}  // namespace abiding::reduce_rms
