#include "peer/buffers.h"

#include <map>
#include <utility>

namespace abiding::peer {
namespace {

// Never destroyed, as the registry; tables_mutex() must be held.
std::map<int64_t, std::shared_ptr<Buffer>>& buffers() {
  static auto* const all = new std::map<int64_t, std::shared_ptr<Buffer>>;
  return *all;
}

}  // namespace

Buffer::~Buffer() {
  try {
    give_back();
  } catch (const std::exception&) {  // there is no caller left to tell
  }
}

void Buffer::give_back() {
  void* at = std::exchange(address, nullptr);
  if (memory->is_cuda && forks != peer::forks()) return;  // a fork has no CUDA context to free it in
  if (at) opened ? memory->close(at) : memory->free(at);
}

int64_t add_buffer(const MemoryBackend& memory, void* address, int64_t bytes, bool opened) {
  const auto key = reinterpret_cast<int64_t>(address);
  auto buffer = std::make_shared<Buffer>(&memory, address, bytes, opened);
  std::lock_guard lock(tables_mutex());
  buffers()[key].swap(buffer);
  return key;
}

void remove_buffer(const char* op, int64_t address, bool opened) {
  std::shared_ptr<Buffer> buffer;
  {
    std::lock_guard lock(tables_mutex());
    const auto found = buffers().find(address);
    check(found != buffers().end() && found->second->opened == opened, op, "ptr is ", address, "; expected what ",
          opened ? "open_mem_handle" : "allocate_shared_buffer_and_handle or allocate_shared_memory_and_handle",
          " returned, once");
    buffer = std::move(found->second);
    buffers().erase(found);
  }
  if (buffer.use_count() == 1) buffer->give_back();  // here, where a failure can raise
}

std::shared_ptr<Buffer> find_buffer(int64_t address, bool is_cuda) {
  std::lock_guard lock(tables_mutex());
  const auto found = buffers().find(address);
  if (found == buffers().end() || found->second->memory->is_cuda != is_cuda || found->second->forks != forks())
    return nullptr;
  return found->second;
}

bool owns(int64_t address, bool is_cuda, int64_t bytes) {
  const auto buffer = find_buffer(address, is_cuda);
  return buffer && buffer->holds(bytes);
}

}  // namespace abiding::peer

bool abiding_peer_owns(int64_t address, bool is_cuda, int64_t bytes) {
  return abiding::peer::owns(address, is_cuda, bytes);
}
