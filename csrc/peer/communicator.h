// What both binaries share about communicators: the registry behind handles, and the memory backend of each kind of
// device.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <vector>

#include "common/check.h"
#include "peer/interrupt.h"
#include "peer/protocol.h"

namespace abiding::peer {

constexpr int64_t kMemoryHandleBytes = 64;  // as of a cudaIpcMemHandle_t

// The functions that allocate, map and clear workspaces on one kind of device. Failures raise. A memory handle names a
// workspace to other processes; it is not the Handle of a communicator.
struct MemoryBackend {
  bool is_cuda;
  // Zeroed, on the current device. Writes kMemoryHandleBytes to `memory_handle`. Errors name `op` and its argument
  // size.
  void* (*allocate)(const char* op, int64_t bytes, uint8_t* memory_handle);
  // Leaves `bytes` as it is where it cannot be known. Errors name `op` and its argument mem_handle.
  void* (*open)(const char* op, const uint8_t* memory_handle, int64_t* bytes);
  void (*close)(void* opened);
  void (*free)(void* allocated);
  void (*clear)(void* at, int64_t bytes);  // zeroes; synchronous
  FaultRecord* (*new_record)();            // zeroed host memory that kernels can write
  void (*free_record)(FaultRecord*);
  void (*send_probes)(const struct Communicator&);  // writes rank + 1 to its probe word on every rank
  // Tells the other ranks that this one has closed (kClosed) or stopped waiting (kInterrupted).
  void (*announce)(const struct Communicator&, Fault fault);
  void (*read)(void* to, const void* from, int64_t bytes);  // from a workspace, after queued work; synchronous
};

struct Communicator {
  int rank = 0, ranks = 0;
  uint8_t* workspaces[kMaxRanks] = {};  // by rank, at this process's addresses
  FaultRecord* record = nullptr;
  const MemoryBackend* memory = nullptr;
  uint64_t timeout_ns = 300'000'000'000;
  int max_ctas = kMaxCtas;
  int64_t one_shot_bytes = -1;  // up to this size an all-reduce is one-shot, the same on all ranks; -1: the default
  std::vector<std::shared_ptr<void>> buffers;  // keeps the workspaces mapped
  uint32_t forks = 0;                          // of the process that it belongs to; see peer/tables.h
  std::atomic<int> references{1};              // the registry's and those of calls; see CommunicatorRef

  Peers peers(const Call& call) const {
    Peers p{};
    p.tag = tag_of(call);
    p.rank = rank;
    p.ranks = ranks;
    p.max_ctas = max_ctas;
    p.record = record;
    p.timeout_ns = timeout_ns;
    for (int i = 0; i < ranks; ++i) p.workspaces[i] = workspaces[(rank + i) % ranks];
    for (int channel = 0; channel < kChannels; ++channel)
      p.region_bytes[channel] = static_cast<uint32_t>(region_bytes(static_cast<Channel>(channel), ranks, max_ctas));
    return p;
  }
};

// A communicator's index and generation, never an address, so that a stale handle is refused.
using Handle = int64_t;

// Each binary has both; the registry is the CPU binary's. acquire() returns null for a handle that is stale, was
// never given out, or belongs to a process that this one was forked from; release() frees the communicator when the
// last reference to it goes, and then may raise.
Communicator* acquire(Handle handle);
void release(Communicator* communicator);

// Whether the address is that of memory of this kind, of at least so many bytes, that operators of this process have
// allocated or opened (peer/buffers.h). Each binary has it, too.
bool owns(int64_t address, bool is_cuda, int64_t bytes);

[[noreturn]] inline void refuse(const char* op, const char* argument, Handle handle) {
  fail(op, argument, " is ", handle,
       "; expected the handle of a communicator that is open in this process (a fork needs its own)");
}

// A call's reference to its communicator. Invariant: while one exists, the communicator, its record and its workspaces
// stay valid, whatever other threads dispose of, close or free.
class CommunicatorRef {
 public:
  CommunicatorRef(const char* op, const char* argument, Handle handle) : communicator_(acquire(handle)) {
    if (!communicator_) refuse(op, argument, handle);
  }
  CommunicatorRef(const CommunicatorRef&) = delete;
  CommunicatorRef& operator=(const CommunicatorRef&) = delete;
  ~CommunicatorRef() {
    try {
      release(communicator_);
    } catch (const std::exception&) {  // freeing failed, after a dispose(); the call itself did not
    }
  }
  Communicator& operator*() const { return *communicator_; }
  Communicator* operator->() const { return communicator_; }

 private:
  Communicator* communicator_;
};

// The CPU binary alone has these.
Handle add(std::unique_ptr<Communicator> communicator);
void remove(const char* op, const char* argument, Handle handle);  // calls in it go on; new ones are refused
const MemoryBackend& cpu_memory_backend();
bool is_cpu_memory_handle(const uint8_t* memory_handle);
const MemoryBackend* cuda_memory_backend();  // null: the CUDA binary is not loaded

}  // namespace abiding::peer

// Exported by the CPU binary. The Python loader hands the first three to the CUDA binary, the CUDA binary's
// MemoryBackend to the fourth, and Python's functions to the last.
extern "C" {
__attribute__((visibility("default"))) abiding::peer::Communicator* abiding_peer_acquire(abiding::peer::Handle handle);
__attribute__((visibility("default"))) void abiding_peer_release(abiding::peer::Communicator* communicator);
__attribute__((visibility("default"))) bool abiding_peer_owns(int64_t address, bool is_cuda, int64_t bytes);
__attribute__((visibility("default"))) void abiding_peer_use_cuda(const abiding::peer::MemoryBackend* memory);
__attribute__((visibility("default"))) void abiding_peer_use_python(const abiding::peer::Python* python);
}
