// The push protocol: ranks write their words into each other's memory, and a word is its own "ready" flag.
//
// Each rank owns a workspace that all ranks can write. For each source it holds two slots of words, taken in turn by even and
// odd epochs. A word that is 0 is empty. To send, a rank stores encoded words, never 0, into its place at the receiver; to
// receive, it polls its own memory until a word is there, and empties it at once. There is no barrier and no fence, since a
// word arrives whole or not at all.
//
// Why two slots are enough: a source sends epoch e + 2 into the slot of epoch e. By then it has received this rank's words of
// epoch e + 1, which this rank sent only after its own epoch e had ended, emptied slots included.
#pragma once

#include <cstdint>

#include "common/numerics.h"

namespace abiding::peer {

constexpr int kMaxRanks = 16;
constexpr int kSlots = 2;
constexpr uint32_t kEmpty = 0;

// One word cannot be sent as it is: the one that encodes to "empty", all ones, a NaN in every dtype that travels here. Its
// stand-in is a NaN too. Inverting makes zeroed memory empty and lets every other word through, -0.0 among them.
ABIDING_HD uint32_t encode(uint32_t word) { return ~(word == 0xFFFFFFFF ? 0x7FFFFFFF : word); }
ABIDING_HD uint32_t decode(uint32_t wire) { return ~wire; }

// The workspace of a rank, in bytes from its start. Channels do not share memory, so ops on different ones never meet.
enum Channel : int {
  kDirect,   // whole messages, or the parts that their owner adds up
  kResult,   // the sums of those parts on their way back
  kScalars,  // one or two numbers a token
  kChannels
};
constexpr int kMaxBlocks = 128;  // blocks of one kernel; each has its own epochs and its own share of a channel
constexpr int64_t kHeaderBytes = 64 << 10;
// A slot of a channel, all sources together.
ABIDING_HD constexpr int64_t slot_bytes(Channel channel) { return channel == kScalars ? 1 << 20 : 8 << 20; }
ABIDING_HD constexpr int64_t channel_at(int channel) {
  int64_t at = kHeaderBytes;
  for (int earlier = 0; earlier < channel; ++earlier) at += kSlots * slot_bytes(static_cast<Channel>(earlier));
  return at;
}
constexpr int64_t kWorkspaceBytes = channel_at(kChannels);

// What one of a rank's `blocks` kernel blocks may send to one rank in an epoch.
ABIDING_HD constexpr int64_t share_bytes(Channel channel, int ranks, int blocks) {
  return slot_bytes(channel) / ranks / blocks / 128 * 128;
}

// Where a share lies in a receiver's workspace. Block b of rank r has share r * blocks + b.
ABIDING_HD int64_t share_at(Channel channel, uint32_t epoch, int share, int64_t bytes) {
  return channel_at(channel) + (epoch % kSlots) * slot_bytes(channel) + share * bytes;
}

// Which operator a rank was in.
enum class Op : uint32_t { kAllReduce, kRmsNorm, kQkNorm };

// Why a communicator stopped. The first fault stays until the communicator is reset.
enum class Fault : uint32_t {
  kNone,
  kTimeout,     // `rank` did not send in time
  kConcurrent,  // `rank` made two calls at once on one communicator
  kGone         // the process of `rank` has ended
};

// What a rank that gives up writes to all others, never 0: the fault, the rank to blame, and itself.
ABIDING_HD constexpr uint32_t poison_word(Fault fault, int rank, int found_by) {
  return static_cast<uint32_t>(fault) | static_cast<uint32_t>(rank) << 8 | static_cast<uint32_t>(found_by) << 16;
}

// A rank's account of its first fault, in host memory that its kernels can write.
struct FaultRecord {
  uint32_t fault;  // a Fault, or ~0 while the rest is being written
  Op op;           // where this rank was when it found out or was told
  uint32_t epoch, block;
  uint32_t rank;      // to blame
  uint32_t found_by;  // this rank, or the one that told it
  uint64_t waited_ns;
};

constexpr uint32_t kTaken = ~0u;  // a turn

// The head of a workspace.
struct Header {
  uint32_t poison;             // a poison_word, from any rank; 0: nobody gave up
  uint32_t pid;                // the owner's process, where the workspace is host memory; 0: unknown
  uint32_t reporting;          // not 0 once a thread of the owner's kernels writes its record
  uint32_t probes[kMaxRanks];  // rank r proves here that its writes arrive
  // Per channel and block, for the owner alone: the epoch, and the epoch once more, or kTaken while a call is in it.
  alignas(128) uint32_t epochs[kChannels][kMaxBlocks];
  alignas(128) uint32_t turns[kChannels][kMaxBlocks];
};
static_assert(sizeof(Header) <= kHeaderBytes);

// A communicator as a kernel sees it, what it always reads in front.
struct Peers {
  int rank, ranks;
  int blocks;                      // that a kernel may have, the same on all ranks
  uint32_t shares[kChannels];      // share_bytes of each channel
  uint8_t* workspaces[kMaxRanks];  // [i]: of rank (rank + i) % ranks, at this process's address; the own one first
  FaultRecord* record;
  uint64_t timeout_ns;
};

}  // namespace abiding::peer
