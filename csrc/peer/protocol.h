// The push protocol: an LL / Lamport-style protocol (NCCL's LL, TensorRT-LLM's Lamport all-reduce), in which ranks
// write words into each other's memory and a data word is its own "ready" flag.
//
// Each rank owns a workspace that all ranks can write. For each source rank it holds two slots of words, used in turn
// by even and odd epochs. To send, a rank stores encoded words into its region at the receiver. To receive, a rank
// polls its own memory until the words are not empty, and empties them at once.
//
// How it differs from NCCL's LL: there is no flag word beside the data, so every byte on the wire is payload, and
// vectors of 16 bytes can be used because each of their words is checked. How it differs from TensorRT-LLM's Lamport:
// words travel inverted, so that zeroed memory is empty and -0.0 needs no special case; two slots suffice, not three,
// because the receiver empties a word when it has read it, not one epoch later; and a rank that stops waiting writes a
// poison word to every rank, so that all of them stop and name the same culprit.
//
// Invariant: a word is either kEmpty or complete. Aligned 4-byte stores are never torn, so polling needs neither a
// barrier nor a fence.
// Invariant: outside a call, every word that a rank has received is empty again.
// Ordering: two slots are enough. A source stores epoch e + 2 into the slot of epoch e only after it has received this
// rank's words of epoch e + 1, and this rank sent those only after its epoch e had ended, with that slot emptied.
//
// Beside the data every rank sends a tag that says who the call is. No call ends before the tags of all ranks have
// arrived and are equal, so a rank whose call is another one (operator, size, dtype) is found by every rank.
// Invariant: epochs count calls, whatever their channels, so that the tags of two different operators meet.
#pragma once

#include <cstdint>

#include "common/dtypes.h"
#include "common/numerics.h"

namespace abiding::peer {

constexpr int kMaxRanks = 16;
constexpr int kSlots = 2;
constexpr uint32_t kEmpty = 0;

// Inverting maps kEmpty, and only kEmpty, to the word 0xFFFFFFFF: a NaN in every dtype that is sent. That one word is
// sent as another NaN.
ABIDING_HD uint32_t encode(uint32_t word) { return ~(word == 0xFFFFFFFF ? 0x7FFFFFFF : word); }
ABIDING_HD uint32_t decode(uint32_t wire) { return ~wire; }

// A workspace is a Header and then the slots of each channel. Channels share no memory, so operators on different
// channels cannot interfere.
enum Channel : int {
  kDirect,   // one-shot: whole messages; two-shot: the reduce-scatter
  kResult,   // two-shot: the all-gather
  kScalars,  // one or two numbers per token
  kTags,     // who the call is: a CallTag per CTA
  kChannels
};
constexpr int kMaxCtas = 128;  // per kernel; each CTA has its own epochs and its own region of a channel
constexpr int64_t kHeaderBytes = 64 << 10;
// The size of one slot of a channel, all sources together.
ABIDING_HD constexpr int64_t slot_bytes(Channel channel) {
  return channel == kTags ? 256 << 10 : channel == kScalars ? 1 << 20 : 8 << 20;
}
// Not a loop over the channels: nvcc leaves such a loop in kernels, on their way to the first load.
ABIDING_HD constexpr int64_t channel_offset(int channel) {
  return kHeaderBytes + (channel > kDirect ? kSlots * slot_bytes(kDirect) : 0) +
         (channel > kResult ? kSlots * slot_bytes(kResult) : 0) +
         (channel > kScalars ? kSlots * slot_bytes(kScalars) : 0) + (channel > kTags ? kSlots * slot_bytes(kTags) : 0);
}
static_assert(kChannels == 4, "channel_offset() names each channel");
constexpr int64_t kWorkspaceBytes = channel_offset(kChannels);

// A region is what one of a rank's `ctas` CTAs may send to one rank in an epoch.
ABIDING_HD constexpr int64_t region_bytes(Channel channel, int ranks, int ctas) {
  return slot_bytes(channel) / ranks / ctas / 128 * 128;
}

// Where a region starts in the receiver's workspace. CTA c of rank r has region r * ctas + c.
ABIDING_HD int64_t region_offset(Channel channel, uint32_t epoch, int region, int64_t bytes) {
  return channel_offset(channel) + (epoch % kSlots) * slot_bytes(channel) + region * bytes;
}

// The operator that a rank is in.
enum class Op : uint32_t { kAllReduce, kRmsNorm, kQkNorm };

// Who a call is: what all ranks must bring alike.
struct Call {
  Op op;
  DType dtype;
  int64_t count;           // elements of a message; rows of a norm
  int64_t widths[2] = {};  // this rank's columns of each part of a row
};

// A Call as it travels: 64 bits, of which the words are encoded as those of the data are, each of them its own "ready"
// flag. Two words and not four, because kernels poll them beside the data and registers are few.
// Invariant: different calls have different tags, up to 2^56 elements, 2^24 rows and widths of 2^17 and 2^15.
struct alignas(8) CallTag {
  uint32_t words[2];
};
static_assert(sizeof(CallTag) <= region_bytes(kTags, kMaxRanks, kMaxCtas));

inline CallTag tag_of(const Call& call) {
  const auto count = static_cast<uint64_t>(call.count);
  const auto first = static_cast<uint64_t>(call.widths[0]), second = static_cast<uint64_t>(call.widths[1]);
  const uint64_t size = call.op == Op::kAllReduce ? count : count << 32 | (first & 0x1FFFF) << 15 | (second & 0x7FFF);
  const uint64_t bits = static_cast<uint64_t>(call.op) | static_cast<uint64_t>(call.dtype) << 4 | size << 8;
  return {{encode(static_cast<uint32_t>(bits)), encode(static_cast<uint32_t>(bits >> 32))}};
}
ABIDING_HD Op op_of(const CallTag& tag) { return static_cast<Op>(decode(tag.words[0]) & 0xF); }
inline Call call_of(const CallTag& tag) {
  const uint64_t bits = static_cast<uint64_t>(decode(tag.words[1])) << 32 | decode(tag.words[0]), size = bits >> 8;
  const auto dtype = static_cast<DType>(bits >> 4 & 0xF);
  if (op_of(tag) == Op::kAllReduce) return {op_of(tag), dtype, static_cast<int64_t>(size)};
  return {op_of(tag),
          dtype,
          static_cast<int64_t>(size >> 32),
          {static_cast<int64_t>(size >> 15 & 0x1FFFF), static_cast<int64_t>(size & 0x7FFF)}};
}

// Why a communicator stopped. The first fault stays until the communicator is reset.
enum class Fault : uint32_t {
  kNone,
  kTimeout,      // `rank` did not send in time
  kConcurrent,   // `rank` made two calls at once on one communicator
  kGone,         // the process of `rank` has ended
  kClosed,       // `rank` has closed its communicator
  kInterrupted,  // a signal's handler raised while `rank` waited
  kMismatch      // `rank` made another call than the rank that found it
};

// What a rank that stops writes to all ranks; never 0. It packs the fault, the culprit and the rank that found it.
ABIDING_HD constexpr uint32_t poison_word(Fault fault, int rank, int found_by) {
  return static_cast<uint32_t>(fault) | static_cast<uint32_t>(rank) << 8 | static_cast<uint32_t>(found_by) << 16;
}
ABIDING_HD constexpr uint32_t fault_of(uint32_t poison) { return poison & 0xFF; }
ABIDING_HD constexpr uint32_t culprit_of(uint32_t poison) { return poison >> 8 & 0xFF; }
ABIDING_HD constexpr uint32_t finder_of(uint32_t poison) { return poison >> 16; }

// What a rank whose communicator had stopped before its call sends in place of the tag: this, and the poison.
constexpr uint32_t kStoppedTag = 0xFF;

// A rank's account of its first fault, in host memory that its kernels can write.
constexpr uint32_t kRecordInWriting = ~0u;
struct FaultRecord {
  uint32_t fault;  // a Fault, or kRecordInWriting; written last
  Op op;           // the operator in which this rank found the fault or saw the poison
  uint32_t epoch, cta;
  uint32_t rank;      // the culprit
  uint32_t found_by;  // this rank, or the rank whose poison it saw
  uint64_t waited_ns;
  CallTag calls[2];  // of the culprit and of the rank that found it, after kMismatch
};

constexpr uint32_t kClaimed = ~0u;  // a claim, while a call holds it

// The start of a workspace.
struct Header {
  uint32_t poison;             // a poison_word from any rank; 0: none
  uint32_t pid;                // the owner's process, where the workspace is host memory; 0: unknown
  uint32_t departed;           // not 0 once the owner has closed, where the workspace is host memory
  uint32_t reporting;          // not 0 once a thread of the owner's kernels writes its record
  uint32_t probes[kMaxRanks];  // rank r shows here that its writes arrive
  CallTag calls[kMaxRanks];    // of the ranks whose calls differ, as far as known; written before the poison
  // Per CTA, written by the owner alone: the current epoch; and a claim, which is equal to the epoch between calls and
  // kClaimed during one.
  alignas(128) uint32_t epochs[kMaxCtas];
  alignas(128) uint32_t claims[kMaxCtas];
};
static_assert(sizeof(Header) <= kHeaderBytes);

// A communicator and a call of it as a kernel parameter. What every call reads comes first.
struct Peers {
  int rank, ranks;
  int max_ctas;                      // per kernel, the same on all ranks
  uint32_t region_bytes[kChannels];  // if max_ctas CTAs share a slot
  CallTag tag;                       // this call's
  uint8_t* workspaces[kMaxRanks];    // [i]: of rank (rank + i) % ranks, at this process's address; the own one first
  FaultRecord* record;
  uint64_t timeout_ns;
};

}  // namespace abiding::peer
