// Memory that operators have allocated or opened, by the addresses that their callers hold. The CPU binary has the
// table. Every address that a raw operator takes must be in it: any other would be followed to whatever it leads to.
#pragma once

#include <cstdint>
#include <memory>

#include "peer/communicator.h"
#include "peer/tables.h"

namespace abiding::peer {

// It is given back when neither its caller nor a communicator or call needs it.
struct Buffer {
  const MemoryBackend* memory;
  void* address;
  int64_t bytes;  // -1: unknown, as that of CUDA memory of another process
  bool opened;
  uint32_t forks = peer::forks();

  Buffer(const MemoryBackend* memory, void* address, int64_t bytes, bool opened)
      : memory(memory), address(address), bytes(bytes), opened(opened) {}
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer();
  void give_back();
  bool holds(int64_t wanted) const { return bytes < 0 || bytes >= wanted; }
};

// Enters memory in the table, under its address.
int64_t add_buffer(const MemoryBackend& memory, void* address, int64_t bytes, bool opened);
// Ends the caller's hold on what open_mem_handle (`opened`) or an allocation has returned.
void remove_buffer(const char* op, int64_t address, bool opened);
// Null: not the address of memory of that kind that this process has allocated or opened, and not given back since. A
// fork owns none of the memory of the process that it was forked from.
std::shared_ptr<Buffer> find_buffer(int64_t address, bool is_cuda);

}  // namespace abiding::peer
