// The push protocol on the device: polling loads of words and 16-byte vectors, epochs, and waits that end.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>

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
__device__ __forceinline__ uint2 load_volatile(const uint2* at) {
  uint2 v;
  asm volatile("ld.volatile.global.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(at));
  return v;
}
__device__ __forceinline__ void store_volatile(uint2* at, const uint2& v) {
  asm volatile("st.volatile.global.v2.u32 [%0], {%1, %2};" ::"l"(at), "r"(v.x), "r"(v.y) : "memory");
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
__device__ __forceinline__ uint32_t min_word(const uint2& v) { return min(v.x, v.y); }
__device__ __forceinline__ uint32_t min_word(uint32_t v) { return v; }

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
__device__ uint64_t poll_slow_path(const Peers& peers, uint32_t epoch, int source, uint64_t since);

__device__ __forceinline__ uint2 own_tag(const Peers& peers) { return {peers.tag.words[0], peers.tag.words[1]}; }
__device__ __forceinline__ bool differ(const uint2& a, const uint2& b) { return a.x != b.x || a.y != b.y; }

// Thread (0, 0): CTAs may be two-dimensional.
__device__ __forceinline__ bool is_cta_leader() { return (threadIdx.x | threadIdx.y) == 0; }

// A CTA's part in one call. begin() claims the CTA's epoch, end() publishes the next one.
//
// The tags of the call travel beside its data: as many threads as there are other ranks send one each, and receive one
// each. They belong in a warp that has no data to wait for, where there is one, because to send and to compare a tag
// takes some 50 instructions. Invariant: every CTA compares the tags of all ranks before it ends. A CTA that another
// rank's call does not have waits until its CTA 0, which every call has, has found the tags to differ.
class CallScope {
 public:
  // This thread exchanges tags with rank `tag_rank`, unless that is this rank or none. Every other rank needs one
  // thread in the CTA.
  __device__ __forceinline__ CallScope(const Peers& peers, Channel channel, int tag_rank)
      : peers_(peers), channel_(channel), tag_rank_(tag_rank) {}

  // All threads of the CTA call this, after pdl_wait.
  __device__ __forceinline__ void begin() {
    Header* own = header(peers_, 0);
    // A second kernel on another stream would find the epoch claimed; end() compares, off the critical path.
    // atomicExch, not atomicAdd: the compiler would warp-aggregate the add and wait for its result here.
    if (is_cta_leader()) claim_ = atomicExch(&own->claims[blockIdx.x], kClaimed);
    epoch_ = load_cached(&own->epochs[blockIdx.x]);
    // Not used here, so that a call's own loads need not wait for it.
    poison_ = load_cached(&own->poison);
  }

  // All threads of the CTA call this before they receive anything. It waits for the poison that begin() loads.
  __device__ __forceinline__ void check_poison() { ok_ = poison_ == 0; }

  // Sends this thread's tag, if it has one. Ordering: a stopped rank must not send the call's. Its CTA may be the first
  // of this index since the calls differed, and meet one that still waits in that call: equal tags would join two
  // calls.
  __device__ __forceinline__ void send_tag() {
    if (tag_rank_ < 0 || tag_rank_ >= peers_.ranks || tag_rank_ == peers_.rank) return;
    const int distance = tag_rank_ >= peers_.rank ? tag_rank_ - peers_.rank : tag_rank_ - peers_.rank + peers_.ranks;
    uint2 tag = own_tag(peers_);
    if (poison_ != 0) tag = {encode(kStoppedTag), encode(poison_)};
    store_volatile(slot_ptr<uint2>(kTags, distance, peers_.rank), tag);
    const uint32_t region = tag_rank_ * peers_.max_ctas + blockIdx.x;
    tag_at_ = static_cast<uint32_t>(channel_offset(kTags)) +
              epoch_ % kSlots * static_cast<uint32_t>(slot_bytes(kTags)) + region * peers_.region_bytes[kTags];
  }

  // Waits for this thread's tag. A thread may call it that waits for no words; end() does it for all.
  __device__ __forceinline__ void receive_tag() {
    if (tag_at_ == 0 || !ok_) return;
    uint32_t no_words[1];
    const auto is_pending = [](int) { return false; };
    const auto nowhere = [](int) -> uint32_t* { return nullptr; };
    load_pending(no_words, tag_rank_, is_pending, nowhere);
    receive(no_words, tag_rank_, is_pending, nowhere);
  }

  // Reports a second kernel on another stream. end() does it, too; kernels whose registers are too few to hold the
  // claim until then call it earlier, and wait for the claim.
  __device__ __forceinline__ void check_claim() {
    if (is_cta_leader() && claim_ != epoch_)
      report_fault(peers_, poison_word(Fault::kConcurrent, peers_.rank, peers_.rank), epoch_, 0);
    claim_ = epoch_;
  }

  // Publishes the next epoch once the tags of all ranks are there. False: the results of this CTA are to be NaN,
  // whatever has been written.
  __device__ __forceinline__ bool end() {
    receive_tag();
    // The call's last warp is awaited at the barrier: the address is computed before it, and what needs the barrier's
    // result comes after the stores.
    uint32_t* epoch = &header(peers_, 0)->epochs[blockIdx.x];
    asm volatile("" : "+l"(epoch));
    const bool all_ok = !__syncthreads_or(!ok_);
    if (is_cta_leader()) {
      store_volatile(epoch, epoch_ + 1);
      store_volatile(epoch + (offsetof(Header, claims) - offsetof(Header, epochs)) / sizeof *epoch, epoch_ + 1);
      if (!all_ok) report_fault(peers_, load_volatile(&header(peers_, 0)->poison), epoch_, 0);
    }
    check_claim();
    return all_ok;
  }

  // False: results are NaN, whatever was received.
  __device__ __forceinline__ bool ok() const { return ok_; }

  // Where the words of `source`'s CTA of this index lie in the workspace of rank (rank + i) % ranks, in this epoch.
  template <class Word>
  __device__ __forceinline__ Word* slot_ptr(Channel channel, int i, int source) const {
    return region_ptr<Word>(peers_, epoch_, channel, i, source);
  }
  // The same in even epochs, so begin() need not have been called. Adding slot_offset() bytes gives the one of this
  // epoch.
  template <class Word>
  __device__ __forceinline__ Word* even_slot_ptr(Channel channel, int i, int source) const {
    return region_ptr<Word>(peers_, 0, channel, i, source);
  }
  __device__ __forceinline__ int64_t slot_offset() const { return epoch_ % kSlots * slot_bytes(channel_); }

  // Loads words[i] from slot_ptr(first + i) for each pending source, and this thread's tag until it is there. The loads
  // are independent, so several take no longer than one. Without kTag, the tag is left to end().
  template <bool kTag = true, int kCount, class Words, class IsPending, class SlotPtr>
  __device__ __forceinline__ void load_pending(Words (&words)[kCount], int first, IsPending is_pending,
                                               SlotPtr slot_ptr) {
#pragma unroll
    for (int i = 0; i < kCount; ++i)
      if (is_pending(first + i)) words[i] = load_volatile(slot_ptr(first + i));
    // After the words, which are sent after the tag: where they have arrived, it nearly always has.
    if constexpr (!kTag) return;
    tag_ = {~kEmpty, ~kEmpty};
    if (tag_at_ != 0) tag_ = load_volatile(tag_slot());
  }

  // Polls until the words of all pending sources from `first` on and this thread's tag have arrived, and empties the
  // words in memory. load_pending() must have loaded them just before. False: the call is over.
  template <bool kTag = true, int kCount, class Words, class IsPending, class SlotPtr>
  __device__ __forceinline__ bool receive(Words (&words)[kCount], int first, IsPending is_pending, SlotPtr slot_ptr) {
    // The latency of the call is in this loop: as little as possible stands between two polls, and behind the last one.
    int polls = ok_ ? kPollsPerCheck : 1;
    uint64_t since = 0;
    while (true) {
      uint32_t all = kTag ? min_word(tag_) : ~kEmpty;
#pragma unroll
      for (int i = 0; i < kCount; ++i)
        if (is_pending(first + i)) all = min(all, min_word(words[i]));
      if (all != kEmpty) break;
      if (--polls == 0) {
        // The words of another call may never come.
        if (tag_at_ != 0) tag_ = load_volatile(tag_slot());
        if (tag_at_ != 0 && min_word(tag_) != kEmpty && differ(tag_, own_tag(peers_))) stop_for_tag();
        int missing = tag_rank_;
#pragma unroll
        for (int i = kCount - 1; i >= 0; --i)
          if (is_pending(first + i) && min_word(words[i]) == kEmpty) missing = first + i;
        ok_ = ok_ && (since = poll_slow_path(peers_, epoch_, missing, since)) != 0;
        if (!ok_) return false;
        polls = kPollsPerCheck;
      }
      load_pending<kTag>(words, first, is_pending, slot_ptr);
    }
#pragma unroll
    for (int i = 0; i < kCount; ++i)
      if (is_pending(first + i)) store_volatile(slot_ptr(first + i), Words{});
    if (kTag && tag_at_ != 0) {
      store_volatile(tag_slot(), uint2{});
      tag_at_ = 0;
      // Not in end(): warps that wait for words of another call may be awaited at a barrier before that.
      if (differ(tag_, own_tag(peers_))) stop_for_tag();
    }
    return true;
  }

  // Records this rank's first fault for the host and writes the poison to every rank. Returns false.
  static __device__ __noinline__ bool report_fault(const Peers& peers, uint32_t poison, uint32_t epoch,
                                                   uint64_t waited_ns) {
    FaultRecord* record = peers.record;
    const auto culprit = static_cast<int>(culprit_of(poison)), finder = static_cast<int>(finder_of(poison));
    const bool mismatch = fault_of(poison) == static_cast<uint32_t>(Fault::kMismatch);
    if (mismatch) __threadfence_system();  // Ordering: the two calls are read after the poison.
    // One thread writes the record. It is chosen in device memory, because the record is in host memory, which has no
    // atomics.
    if (atomicExch(&header(peers, 0)->reporting, 1u) == 0) {
      record->op = op_of(peers.tag);
      record->epoch = epoch;
      record->cta = blockIdx.x;
      record->rank = culprit;
      record->found_by = finder;
      record->waited_ns = waited_ns;
      if (mismatch) {
        store_volatile(call_slot(&record->calls[0]), load_volatile(call_slot(&header(peers, 0)->calls[culprit])));
        store_volatile(call_slot(&record->calls[1]), load_volatile(call_slot(&header(peers, 0)->calls[finder])));
      }
      __threadfence_system();
      store_volatile(&record->fault, fault_of(poison));
    }
#pragma unroll 1
    for (int i = 0; i < peers.ranks; ++i) {
      if (load_volatile(&header(peers, i)->poison) != 0) continue;
      if (mismatch && finder == peers.rank) {
        for (const int rank : {culprit, finder})
          store_volatile(call_slot(&header(peers, i)->calls[rank]),
                         load_volatile(call_slot(&header(peers, 0)->calls[rank])));
        __threadfence_system();  // Ordering: the two calls before the poison.
      }
      store_volatile(&header(peers, i)->poison, poison);
    }
    __threadfence_system();
    return false;
  }

 private:
  template <class Word>
  static __device__ __forceinline__ Word* region_ptr(const Peers& peers, uint32_t epoch, Channel channel, int i,
                                                     int source) {
    const int region = source * peers.max_ctas + static_cast<int>(blockIdx.x);
    return reinterpret_cast<Word*>(peers.workspaces[i] +
                                   region_offset(channel, epoch, region, peers.region_bytes[channel]));
  }
  static __device__ __forceinline__ uint2* call_slot(CallTag* call) { return reinterpret_cast<uint2*>(call); }

  __device__ __forceinline__ uint2* tag_slot() const {
    return reinterpret_cast<uint2*>(peers_.workspaces[0] + tag_at_);
  }

  // Stops this rank because the tag that has arrived is not its own: a call has differed, or its sender has stopped
  // before. The other ranks are told by report_fault(), which is too much code to call here.
  __device__ __forceinline__ void stop_for_tag() {
    Header* own = header(peers_, 0);
    uint32_t poison = decode(tag_.y);
    if (decode(tag_.x) != kStoppedTag) {
      poison = poison_word(Fault::kMismatch, tag_rank_, peers_.rank);
      store_volatile(call_slot(&own->calls[tag_rank_]), tag_);
      store_volatile(call_slot(&own->calls[peers_.rank]), own_tag(peers_));
      __threadfence();  // Ordering: the two calls before the poison.
    }
    if (load_volatile(&own->poison) == 0) store_volatile(&own->poison, poison);
    ok_ = false;
  }

  const Peers& peers_;
  Channel channel_;
  int tag_rank_;
  uint32_t tag_at_ = 0;  // from send_tag() until the other rank's tag has arrived: its offset in the workspace
  uint2 tag_{};          // what load_pending() has loaded of it
  uint32_t epoch_ = 0, poison_ = 0, claim_ = 0;
  bool ok_ = true;
};

__device__ __noinline__ inline uint64_t poll_slow_path(const Peers& peers, uint32_t epoch, int source, uint64_t since) {
  const uint64_t now = now_ns(), waited = since ? now - since : 0;
  uint32_t poison = load_volatile(&header(peers, 0)->poison);
  if (poison == 0 && waited > peers.timeout_ns) poison = poison_word(Fault::kTimeout, source, peers.rank);
  if (poison != 0) return CallScope::report_fault(peers, poison, epoch, waited);
  return since ? since : now;
}

}  // namespace abiding::peer
