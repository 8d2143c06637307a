// How the warp of a token exchanges its sum of squares with the other ranks.
#pragma once

#include <limits>
#include <type_traits>

#include "peer/device.cuh"
#include "reduce_rms/params.h"

namespace abiding::reduce_rms {

using peer::Peers;
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

// A token has one word per part. Lane l of a warp exchanges part l / 16 with rank l % 16.
static_assert(peer::kMaxRanks == 16);
struct Lane {
  int part, rank;
  __device__ __forceinline__ explicit Lane(unsigned lane)
      : part(static_cast<int>(lane / 16)), rank(static_cast<int>(lane % 16)) {}
};

// Which lanes of a CTA exchange the call's tags, and when.
enum class TagLanes {
  kIdleWarp,    // a token's second warp, while the first exchanges words; if there is none, as kBesideData
  kBesideData,  // the first warp, in the loop that polls for words
  kAtEnd        // the first warp, in end(): an L2 access later, but it takes fewer registers
};

// Exchange over a communicator's workspaces.
template <int kParts, TagLanes kTagLanes>
class WorkspaceExchange {
 public:
  __device__ __forceinline__ WorkspaceExchange(const Peers& peers, Lane lane)
      : peers_(peers), lane_(lane), scope_(peers, peer::kScalars, is_tag_lane() ? lane.rank : -1) {}
  static __device__ __forceinline__ bool has_idle_warp() { return kTagLanes == TagLanes::kIdleWarp && blockDim.x > 32; }
  static __device__ __forceinline__ bool is_tag_lane() {
    return threadIdx.y == 0 && threadIdx.x - (has_idle_warp() ? 32 : 0) < 16;
  }
  __device__ __forceinline__ int ranks() const { return peers_.ranks; }
  __device__ __forceinline__ void begin() { scope_.begin(); }

  // Finds the slots of even epochs for token `index` of this CTA. The arithmetic overlaps with loads in flight; the asm
  // statements keep the compiler from moving it behind them.
  __device__ __forceinline__ void find_slots(int index) {
    const int other = is_remote() ? lane_.rank : peers_.rank;  // lanes without a rank get valid pointers, too
    const int distance = other >= peers_.rank ? other - peers_.rank : other - peers_.rank + peers_.ranks;
    const int word = index * kParts + lane_.part;
    to_ = scope_.template even_slot_ptr<uint32_t>(peer::kScalars, distance, peers_.rank) + word;
    from_ = scope_.template even_slot_ptr<uint32_t>(peer::kScalars, 0, other) + word;
    asm volatile("" : "+l"(to_), "+l"(from_));
  }
  __device__ __forceinline__ void select_epoch() {
    to_ += scope_.slot_offset() / static_cast<int64_t>(sizeof *to_);
    from_ += scope_.slot_offset() / static_cast<int64_t>(sizeof *from_);
    asm volatile("" : "+l"(to_), "+l"(from_));
    scope_.check_poison();
    if (!has_idle_warp()) scope_.send_tag();
  }
  // The threads that exchange no words call this meanwhile.
  __device__ __forceinline__ void exchange_tag() {
    if (!has_idle_warp() || !is_tag_lane()) return;
    scope_.send_tag();
    scope_.receive_tag();
  }
  __device__ __forceinline__ void check_claim() { scope_.check_claim(); }
  // Moves on by a number of this CTA's tokens.
  __device__ __forceinline__ void advance(int tokens) {
    to_ += tokens * kParts;
    from_ += tokens * kParts;
  }

  // Sends `own`, this rank's sum, and returns that of rank l % 16, or 0 if there is no such rank.
  __device__ __forceinline__ float exchange(int64_t /*token*/, float own) {
    if (!scope_.ok()) return kNan;
    if (!is_remote()) return lane_.rank == peers_.rank ? own : 0.0f;
    peer::store_volatile(to_, peer::encode(__float_as_uint(own)));
    uint32_t word[1];
    const auto is_pending = [](int) { return true; };
    const auto slot_ptr = [&](int) { return from_; };
    constexpr bool kTag = kTagLanes != TagLanes::kAtEnd;
    scope_.load_pending<kTag>(word, lane_.rank, is_pending, slot_ptr);
    const bool ok = scope_.receive<kTag>(word, lane_.rank, is_pending, slot_ptr);
    return ok ? __uint_as_float(peer::decode(word[0])) : kNan;
  }
  // False: the results of this CTA are to be NaN.
  __device__ __forceinline__ bool end() { return scope_.end(); }

 private:
  __device__ __forceinline__ bool is_remote() const {
    return lane_.rank != peers_.rank && lane_.rank < peers_.ranks && lane_.part < kParts;
  }

  const Peers& peers_;
  Lane lane_;
  peer::CallScope scope_;
  uint32_t *to_ = nullptr, *from_ = nullptr;
};

// Exchange over upstream's table. The whole grid has one epoch, which the CTA that finishes last publishes.
template <int kParts>
class TableExchange {
 public:
  __device__ __forceinline__ TableExchange(const TableParams& table, Lane lane) : table_(table), lane_(lane) {}
  __device__ __forceinline__ void begin() {
    slot_bytes_ = static_cast<uint32_t>(static_cast<const int64_t*>(table_.pointers[3 * table_.ranks + 1])[1]);
    region_bytes_ = slot_bytes_ / table_.ranks / 16 * 16;
    epoch_ = peer::load_volatile(&counters()[2]);
  }
  __device__ __forceinline__ int ranks() const { return table_.ranks; }
  __device__ __forceinline__ void find_slots(int /*index*/) {}
  __device__ __forceinline__ void select_epoch() {}
  __device__ __forceinline__ void exchange_tag() {}
  __device__ __forceinline__ void check_claim() {}
  __device__ __forceinline__ void advance(int /*tokens*/) {}

  __device__ __forceinline__ float exchange(int64_t token, float own) {
    if (lane_.rank >= table_.ranks || lane_.part >= kParts) return 0.0f;
    if (lane_.rank == table_.rank) return own;
    if (timed_out_ || (token + 1) * kParts * static_cast<int64_t>(sizeof own) > region_bytes_)
      return kNan;  // the table may have been made for fewer tokens
    const int64_t at = token * kParts + lane_.part;
    peer::store_volatile(slot_ptr(lane_.rank, table_.rank) + at, peer::encode(__float_as_uint(own)) ^ kTableEmpty);
    uint32_t* from = slot_ptr(table_.rank, lane_.rank) + at;
    uint32_t word = peer::load_volatile(from);
    uint64_t since = 0;
    for (int polls = peer::kPollsPerCheck; word == kTableEmpty;) {
      if (--polls == 0) {
        polls = peer::kPollsPerCheck;
        const uint64_t now = peer::now_ns();
        if (since == 0) since = now;
        if (now - since > table_.timeout_ns) {
          timed_out_ = true;
          return kNan;
        }
      }
      word = peer::load_volatile(from);
    }
    peer::store_volatile(from, kTableEmpty);
    return __uint_as_float(peer::decode(word ^ kTableEmpty));
  }

  __device__ __forceinline__ bool end() {
    __syncthreads();
    if (peer::is_cta_leader() && atomicAdd(&counters()[0], 1u) == gridDim.x - 1) {
      peer::store_volatile(&counters()[0], 0u);
      peer::store_volatile(&counters()[2], epoch_ + 1);
    }
    return true;
  }

 private:
  __device__ __forceinline__ uint32_t* slot_ptr(int receiver, int source) const {
    auto* buffer = static_cast<uint8_t*>(table_.pointers[2 * table_.ranks + receiver]);
    return reinterpret_cast<uint32_t*>(buffer + epoch_ % peer::kSlots * slot_bytes_ + source * region_bytes_);
  }
  __device__ __forceinline__ uint32_t* counters() const {
    return static_cast<uint32_t*>(table_.pointers[3 * table_.ranks]);
  }

  const TableParams& table_;
  Lane lane_;
  uint32_t slot_bytes_ = 0, region_bytes_ = 0, epoch_ = 0;
  bool timed_out_ = false;
};

// The exchange of a kernel whose parameter is Endpoint: Peers or TableParams.
template <class Endpoint, int kParts, TagLanes kTagLanes>
using ExchangeOver =
    std::conditional_t<std::is_same_v<Endpoint, Peers>, WorkspaceExchange<kParts, kTagLanes>, TableExchange<kParts>>;

}  // namespace abiding::reduce_rms
