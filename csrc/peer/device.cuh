// The push protocol on the device: polling loads of words and 16-byte vectors, epochs, and waits that end.
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

// Loads through L1, so that all threads of a CTA cause one access to L2. L1 is coherent after pdl_wait: it holds
// nothing that an upstream kernel has changed.
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
// The smallest word. It is kEmpty if any word is, because kEmpty is 0.
static_assert(kEmpty == 0);
__device__ __forceinline__ uint32_t min_word(const uint4& v) { return min(min(v.x, v.y), min(v.z, v.w)); }
__device__ __forceinline__ uint32_t min_word(uint32_t v) { return v; }

// Loads words[i] from slot_ptr(first + i) for each pending source. The loads are independent, so several take no longer
// than one.
template <int kCount, class Words, class IsPending, class SlotPtr>
__device__ __forceinline__ void load_pending(Words (&words)[kCount], int first, IsPending is_pending,
                                             SlotPtr slot_ptr) {
#pragma unroll
  for (int i = 0; i < kCount; ++i)
    if (is_pending(first + i)) words[i] = load_volatile(slot_ptr(first + i));
}

// (rank + i) % ranks for i <= ranks, without a division.
__device__ __forceinline__ int rank_after(int rank, int i, int ranks) {
  return rank + i < ranks ? rank + i : rank + i - ranks;
}

// The header of the workspace of rank (rank + i) % ranks.
__device__ __forceinline__ Header* header(const Peers& peers, int i) {
  return reinterpret_cast<Header*>(peers.workspaces[i]);
}

constexpr int kPollsPerCheck = 1024;

// Looks for poison and checks the time, once per kPollsPerCheck polls. `since` is when the wait began, 0 in its first
// call. Returns 0: stop. Otherwise the time at which the wait began, for the next call.
__device__ uint64_t poll_slow_path(const Peers& peers, Op op, uint32_t epoch, int source, uint64_t since);

// Thread (0, 0): CTAs may be two-dimensional.
__device__ __forceinline__ bool is_cta_leader() { return (threadIdx.x | threadIdx.y) == 0; }

// A CTA's part in one call. begin() claims the CTA's epoch, end() publishes the next one.
class CallScope {
 public:
  __device__ __forceinline__ CallScope(const Peers& peers, Channel channel, Op op)
      : peers_(peers), channel_(channel), op_(op) {}

  // All threads of the CTA call this, after pdl_wait.
  __device__ __forceinline__ void begin() {
    Header* own = header(peers_, 0);
    // A second kernel on another stream would find the epoch claimed; end() compares, off the critical path.
    // atomicExch, not atomicAdd: the compiler would warp-aggregate the add and wait for its result here.
    if (is_cta_leader()) claim_ = atomicExch(&own->claims[channel_][blockIdx.x], kClaimed);
    epoch_ = load_cached(&own->epochs[channel_][blockIdx.x]);
    // Used only when a result is written, so that a call's own loads need not wait for it.
    poison_ = load_cached(&own->poison);
  }

  __device__ __forceinline__ void end() {
    __syncthreads();
    if (!is_cta_leader()) return;
    if (poison_ != 0) report_fault(peers_, poison_, op_, epoch_, 0);
    if (claim_ != epoch_)
      report_fault(peers_, poison_word(Fault::kConcurrent, peers_.rank, peers_.rank), op_, epoch_, 0);
    store_volatile(&header(peers_, 0)->epochs[channel_][blockIdx.x], epoch_ + 1);
    store_volatile(&header(peers_, 0)->claims[channel_][blockIdx.x], epoch_ + 1);
  }

  // False: results are NaN, whatever was received.
  __device__ __forceinline__ bool ok() const { return ok_ && poison_ == 0; }

  // Where the words of `source`'s CTA of this index lie in the workspace of rank (rank + i) % ranks, in this epoch.
  template <class Word>
  __device__ __forceinline__ Word* slot_ptr(Channel channel, int i, int source) const {
    return region_ptr<Word>(epoch_, channel, i, source);
  }
  // The same in even epochs, so begin() need not have been called. Adding slot_offset() bytes gives the one of this
  // epoch.
  template <class Word>
  __device__ __forceinline__ Word* even_slot_ptr(Channel channel, int i, int source) const {
    return region_ptr<Word>(0, channel, i, source);
  }
  __device__ __forceinline__ int64_t slot_offset() const { return epoch_ % kSlots * slot_bytes(channel_); }

  // Polls until the words of all pending sources from `first` on have arrived, and empties them in memory. words[i]
  // must have been loaded from slot_ptr(first + i) just before. False: the call is over.
  template <int kCount, class Words, class IsPending, class SlotPtr>
  __device__ __forceinline__ bool receive(Words (&words)[kCount], int first, IsPending is_pending, SlotPtr slot_ptr) {
    // The latency of the call is in this loop: as little as possible stands between two polls, and behind the last one.
    int polls = ok_ ? kPollsPerCheck : 1;
    uint64_t since = 0;
    while (true) {
      uint32_t all = ~kEmpty;
#pragma unroll
      for (int i = 0; i < kCount; ++i)
        if (is_pending(first + i)) all = min(all, min_word(words[i]));
      if (all != kEmpty) break;
      if (--polls == 0) {
        int missing = first;
#pragma unroll
        for (int i = kCount - 1; i >= 0; --i)
          if (is_pending(first + i) && min_word(words[i]) == kEmpty) missing = first + i;
        ok_ = ok_ && (since = poll_slow_path(peers_, op_, epoch_, missing, since)) != 0;
        if (!ok_) return false;
        polls = kPollsPerCheck;
      }
      load_pending(words, first, is_pending, slot_ptr);
    }
#pragma unroll
    for (int i = 0; i < kCount; ++i)
      if (is_pending(first + i)) store_volatile(slot_ptr(first + i), Words{});
    return true;
  }

  // Records this rank's first fault for the host and writes the poison to every rank. Returns false.
  static __device__ __noinline__ bool report_fault(const Peers& peers, uint32_t poison, Op op, uint32_t epoch,
                                                   uint64_t waited_ns) {
    FaultRecord* record = peers.record;
    // One thread writes the record. It is chosen in device memory, because the record is in host memory, which has no
    // atomics.
    if (atomicExch(&header(peers, 0)->reporting, 1u) == 0) {
      record->op = op;
      record->epoch = epoch;
      record->cta = blockIdx.x;
      record->rank = culprit_of(poison);
      record->found_by = finder_of(poison);
      record->waited_ns = waited_ns;
      __threadfence_system();
      store_volatile(&record->fault, fault_of(poison));
    }
    for (int i = 0; i < peers.ranks; ++i)
      if (load_volatile(&header(peers, i)->poison) == 0) store_volatile(&header(peers, i)->poison, poison);
    __threadfence_system();
    return false;
  }

 private:
  template <class Word>
  __device__ __forceinline__ Word* region_ptr(uint32_t epoch, Channel channel, int i, int source) const {
    const int region = source * peers_.max_ctas + static_cast<int>(blockIdx.x);
    return reinterpret_cast<Word*>(peers_.workspaces[i] +
                                   region_offset(channel, epoch, region, peers_.region_bytes[channel]));
  }

  const Peers& peers_;
  Channel channel_;
  Op op_;
  uint32_t epoch_ = 0, poison_ = 0, claim_ = 0;
  bool ok_ = true;
};

__device__ __noinline__ inline uint64_t poll_slow_path(const Peers& peers, Op op, uint32_t epoch, int source,
                                                       uint64_t since) {
  const uint64_t now = now_ns(), waited = since ? now - since : 0;
  uint32_t poison = load_volatile(&header(peers, 0)->poison);
  if (poison == 0 && waited > peers.timeout_ns) poison = poison_word(Fault::kTimeout, source, peers.rank);
  if (poison != 0) return CallScope::report_fault(peers, poison, op, epoch, waited);
  return since ? since : now;
}

}  // namespace abiding::peer
