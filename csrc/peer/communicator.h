// What both binaries know of communicators: the registry behind handles, and how each kind of device shares memory.
#pragma once

#include <cstdint>
#include <memory>

#include "common/check.h"
#include "peer/protocol.h"

namespace abiding::peer {

constexpr int64_t kHandleBytes = 64;  // of a memory handle, as of a cudaIpcMemHandle_t

// Memory that other processes can map. Failures raise; `close` and `free` refuse what `open` and `allocate` did not return.
struct Memory {
  void* (*allocate)(int64_t bytes, uint8_t* handle);  // zeroed, on the current device; writes kHandleBytes
  void* (*open)(const uint8_t* handle);
  void (*close)(void* opened);
  void (*free)(void* allocated);
  void (*clear)(void* at, int64_t bytes);  // to zeros, done when it returns
  FaultRecord* (*new_record)();            // zeroed host memory that kernels can write
  void (*free_record)(FaultRecord*);
  void (*send_probes)(const struct Communicator&);          // writes rank + 1 to its place everywhere
  void (*read)(void* to, const void* from, int64_t bytes);  // from a workspace, once what is queued is done
};

struct Communicator {
  int rank, ranks;
  uint8_t* workspaces[kMaxRanks];  // by rank, at this process's addresses
  FaultRecord* record;
  const Memory* memory;
  uint64_t timeout_ns = 300'000'000'000;
  int max_blocks = kMaxBlocks;
  int64_t one_shot_bytes = -1;  // up to which an all-reduce takes one hop, the same on all ranks; -1: its own choice

  Peers peers() const {
    Peers p{rank, ranks, max_blocks, {}, {}, record, timeout_ns};
    for (int i = 0; i < ranks; ++i) p.workspaces[i] = workspaces[(rank + i) % ranks];
    for (int channel = 0; channel < kChannels; ++channel)
      p.shares[channel] = static_cast<uint32_t>(share_bytes(static_cast<Channel>(channel), ranks, max_blocks));
    return p;
  }
};

// A handle is an index and a generation, never an address: a stale one is refused.
using Handle = int64_t;

// Null: stale or never given out. Each binary has its own; the registry is the CPU binary's.
Communicator* find(Handle handle);

[[noreturn]] inline void refuse(const char* op, const char* argument, Handle handle) {
  fail(op, argument, " is ", handle, "; expected the handle of a communicator that is open in this process");
}

inline Communicator& find_or_fail(const char* op, const char* argument, Handle handle) {
  Communicator* communicator = find(handle);
  if (!communicator) refuse(op, argument, handle);
  return *communicator;
}

// The CPU binary alone has these. A communicator is removed when no call is in it; its memory is the remover's to free.
Handle add(const Communicator& communicator);
std::unique_ptr<Communicator> remove(const char* op, const char* argument, Handle handle);
const Memory& cpu_memory();
bool is_cpu_handle(const uint8_t* handle);
const Memory* cuda_memory();  // null: the CUDA binary is not loaded

}  // namespace abiding::peer

// Exported by the CPU binary, which owns the registry. The Python loader hands `abiding_peer_find` to the CUDA binary and the
// CUDA binary's `Memory` to the CPU binary.
extern "C" {
__attribute__((visibility("default"))) abiding::peer::Communicator* abiding_peer_find(abiding::peer::Handle handle);
__attribute__((visibility("default"))) void abiding_peer_use_cuda(const abiding::peer::Memory* memory);
}
