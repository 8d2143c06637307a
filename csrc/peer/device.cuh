// The push protocol on the device: packs of four words, epochs, and waits that end.
#pragma once

#include <cuda_runtime.h>

#include "common/launch.cuh"
#include "peer/protocol.h"

namespace abiding::peer {

__device__ __forceinline__ uint4 load_volatile(const uint4* at) {
  uint4 v;
  asm volatile("ld.volatile.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(at));
  return v;
}
__device__ __forceinline__ void store_volatile(uint4* at, const uint4& v) {
  asm volatile("st.volatile.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(at), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
               : "memory");
}
__device__ __forceinline__ uint32_t load_volatile(const uint32_t* at) {
  uint32_t v;
  asm volatile("ld.volatile.global.u32 %0, [%1];" : "=r"(v) : "l"(at));
  return v;
}
__device__ __forceinline__ void store_volatile(uint32_t* at, uint32_t v) {
  asm volatile("st.volatile.global.u32 [%0], %1;" ::"l"(at), "r"(v) : "memory");
}

// By way of the first-level cache, which the wait for earlier grids has made current: a word that all threads of a block look at is
// asked for once.
__device__ __forceinline__ uint32_t load_cached(const uint32_t* at) {
  uint32_t v;
  asm volatile("ld.global.u32 %0, [%1];" : "=r"(v) : "l"(at) : "memory");
  return v;
}

__device__ __forceinline__ uint64_t now_ns() {
  uint64_t t;
  asm volatile("mov.u64 %0, %globaltimer;" : "=l"(t));
  return t;
}

__device__ __forceinline__ uint4 encode(const uint4& v) { return {encode(v.x), encode(v.y), encode(v.z), encode(v.w)}; }
__device__ __forceinline__ uint4 decode(const uint4& v) { return {decode(v.x), decode(v.y), decode(v.z), decode(v.w)}; }
// The least word: kEmpty if one is, as that is 0.
static_assert(kEmpty == 0);
__device__ __forceinline__ uint32_t least(const uint4& v) { return min(min(v.x, v.y), min(v.z, v.w)); }
__device__ __forceinline__ uint32_t least(uint32_t v) { return v; }

// Loads words[i] from place(first + i) where that is `awaited`. All are on their way at once: several take no longer than one.
template <int kCount, class Words, class Awaited, class Place>
__device__ __forceinline__ void load_awaited(Words (&words)[kCount], int first, Awaited awaited, Place place) {
#pragma unroll
  for (int i = 0; i < kCount; ++i)
    if (awaited(first + i)) words[i] = load_volatile(place(first + i));
}

// The rank that comes i after a rank, for i up to ranks: (rank + i) % ranks without a division.
__device__ __forceinline__ int rank_after(int rank, int i, int ranks) {
  return rank + i < ranks ? rank + i : rank + i - ranks;
}

// The head of the workspace of rank (rank + i) % ranks.
__device__ __forceinline__ Header* header(const Peers& peers, int i) {
  return reinterpret_cast<Header*>(peers.workspaces[i]);
}

// The first fault of a rank is kept for the host, and every rank is told. Returns false.
__device__ __noinline__ inline bool give_up(const Peers& peers, uint32_t poison, Op op, uint32_t epoch,
                                            uint64_t waited_ns) {
  FaultRecord* record = peers.record;
  if (atomicExch(&header(peers, 0)->reporting, 1u) == 0) {  // the record is in host memory, which has no atomics
    record->op = op;
    record->epoch = epoch;
    record->block = blockIdx.x;
    record->rank = poison >> 8 & 0xFF;
    record->found_by = poison >> 16;
    record->waited_ns = waited_ns;
    __threadfence_system();
    store_volatile(&record->fault, poison & 0xFF);
  }
  for (int i = 0; i < peers.ranks; ++i)
    if (load_volatile(&header(peers, i)->poison) == 0) store_volatile(&header(peers, i)->poison, poison);
  __threadfence_system();
  return false;
}

constexpr int kPolls = 1024;

// Once in so many polls: has a rank given up, is the time over? Returns when the wait began (now, if since is 0), or 0 to stop.
__device__ __noinline__ inline uint64_t keep_waiting(const Peers& peers, Op op, uint32_t epoch, int source,
                                                     uint64_t since) {
  const uint64_t now = now_ns(), waited = since ? now - since : 0;
  uint32_t poison = load_volatile(&header(peers, 0)->poison);
  if (poison == 0 && waited > peers.timeout_ns) poison = poison_word(Fault::kTimeout, source, peers.rank);
  if (poison != 0) return give_up(peers, poison, op, epoch, waited);
  return since ? since : now;
}

// A block may have several rows of threads.
__device__ __forceinline__ bool leads_block() { return (threadIdx.x | threadIdx.y) == 0; }

// A block's part in one call: its epoch, and how long it may wait.
class Turn {
 public:
  __device__ __forceinline__ Turn(const Peers& peers, Channel channel, Op op)
      : peers_(peers), channel_(channel), op_(op) {}

  // All threads of the block call this, after the wait for earlier grids.
  __device__ __forceinline__ void begin() {
    Header* own = header(peers_, 0);
    // A second kernel on another stream would find this one's turn taken. The answer is looked at last. Of an atomic addition,
    // compilers make one for the warp and wait for it.
    if (leads_block()) turn_ = atomicExch(&own->turns[channel_][blockIdx.x], kTaken);
    epoch_ = load_cached(&own->epochs[channel_][blockIdx.x]);
    // Looked at when a result is written: a call's own loads need not wait for it.
    poison_ = load_cached(&own->poison);
  }

  __device__ __forceinline__ void end() {
    __syncthreads();
    if (!leads_block()) return;
    if (poison_ != 0) give_up(peers_, poison_, op_, epoch_, 0);
    if (turn_ != epoch_) give_up(peers_, poison_word(Fault::kConcurrent, peers_.rank, peers_.rank), op_, epoch_, 0);
    store_volatile(&header(peers_, 0)->epochs[channel_][blockIdx.x], epoch_ + 1);
    store_volatile(&header(peers_, 0)->turns[channel_][blockIdx.x], epoch_ + 1);
  }

  // False: the results are NaN, whatever was received.
  __device__ __forceinline__ bool ok() const { return ok_ && poison_ == 0; }

  // This block's place for the words of `source` in the workspace of rank (rank + i) % ranks.
  template <class Word>
  __device__ __forceinline__ Word* place(Channel channel, int i, int source) const {
    return place_in<Word>(epoch_, channel, i, source);
  }
  // The same in even epochs. It needs no begin(); slot() bytes from there is that of this epoch.
  template <class Word>
  __device__ __forceinline__ Word* even_place(Channel channel, int i, int source) const {
    return place_in<Word>(0, channel, i, source);
  }

  __device__ __forceinline__ int64_t slot() const { return epoch_ % kSlots * slot_bytes(channel_); }

  // Polls until the words of all sources from `first` on that are `awaited` have come, and empties them. words[i] was loaded
  // just before from place(first + i). False: the call is over.
  template <int kCount, class Words, class Awaited, class Place>
  __device__ __forceinline__ bool receive(Words (&words)[kCount], int first, Awaited awaited, Place place) {
    // Little stands between a poll and the next one, and between the last one and what follows it.
    int polls = ok_ ? kPolls : 1;
    uint64_t since = 0;
    while (true) {
      uint32_t all = ~kEmpty;
#pragma unroll
      for (int i = 0; i < kCount; ++i)
        if (awaited(first + i)) all = min(all, least(words[i]));
      if (all != kEmpty) break;
      if (--polls == 0) {
        int missing = first;
#pragma unroll
        for (int i = kCount - 1; i >= 0; --i)
          if (awaited(first + i) && least(words[i]) == kEmpty) missing = first + i;
        ok_ = ok_ && (since = keep_waiting(peers_, op_, epoch_, missing, since)) != 0;
        if (!ok_) return false;
        polls = kPolls;
      }
      load_awaited(words, first, awaited, place);
    }
#pragma unroll
    for (int i = 0; i < kCount; ++i)
      if (awaited(first + i)) store_volatile(place(first + i), Words{});
    return true;
  }

 private:
  template <class Word>
  __device__ __forceinline__ Word* place_in(uint32_t epoch, Channel channel, int i, int source) const {
    const int share = source * peers_.blocks + static_cast<int>(blockIdx.x);
    return reinterpret_cast<Word*>(peers_.workspaces[i] + share_at(channel, epoch, share, peers_.shares[channel]));
  }

  const Peers& peers_;
  Channel channel_;
  Op op_;
  uint32_t epoch_ = 0, poison_ = 0, turn_ = 0;
  bool ok_ = true;
};

}  // namespace abiding::peer
