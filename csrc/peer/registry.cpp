// The registry of communicators, which both binaries share.
#include <pthread.h>

#include <utility>

#include "peer/communicator.h"
#include "peer/tables.h"

namespace abiding::peer {
namespace {

// Entries are reused, each time under the next generation. Handle = generation << 32 | index.
struct Entry {
  Communicator* communicator = nullptr;
  uint32_t generation = 0;
};

struct Registry {
  std::vector<Entry> entries;

  // Null: no open communicator has this handle. tables_mutex() must be held.
  Entry* find(Handle handle) {
    const uint64_t index = static_cast<uint64_t>(handle) & 0xFFFFFFFF, generation = static_cast<uint64_t>(handle) >> 32;
    if (index >= entries.size() || entries[index].generation != generation) return nullptr;
    return entries[index].communicator ? &entries[index] : nullptr;
  }
};

// Never destroyed: operators may be called until the process ends.
Registry& registry() {
  static auto* const one = new Registry;
  return *one;
}

uint32_t fork_count = 0;

}  // namespace

std::mutex& tables_mutex() {
  static auto* const mutex = [] {
    static auto* const made = new std::mutex;
    pthread_atfork([] { made->lock(); }, [] { made->unlock(); },
                   [] {
                     ++fork_count;
                     made->unlock();
                   });
    return made;
  }();
  return *mutex;
}

uint32_t forks() { return fork_count; }

Communicator* acquire(Handle handle) {
  std::lock_guard lock(tables_mutex());
  const Entry* entry = registry().find(handle);
  if (!entry || entry->communicator->forks != forks()) return nullptr;
  entry->communicator->references.fetch_add(1, std::memory_order_relaxed);
  return entry->communicator;
}

void release(Communicator* communicator) {
  if (communicator->references.fetch_sub(1, std::memory_order_acq_rel) != 1) return;
  const std::unique_ptr<Communicator> last(communicator);
  // A forked process has no CUDA context to free the copy of a record in.
  if (last->forks == forks() || !last->memory->is_cuda) last->memory->free_record(last->record);
}

Handle add(std::unique_ptr<Communicator> communicator) {
  std::lock_guard lock(tables_mutex());
  std::vector<Entry>& entries = registry().entries;
  size_t index = 0;
  while (index < entries.size() && entries[index].communicator) ++index;
  if (index == entries.size()) entries.emplace_back();
  Entry& entry = entries[index];
  communicator->forks = forks();
  entry.communicator = communicator.release();
  entry.generation = (entry.generation + 1) & 0x7FFFFFFF;
  if (entry.generation == 0) entry.generation = 1;  // so that no handle is a small number
  return static_cast<Handle>(entry.generation) << 32 | static_cast<Handle>(index);
}

void remove(const char* op, const char* argument, Handle handle) {
  Communicator* communicator = nullptr;
  {
    std::lock_guard lock(tables_mutex());
    Entry* entry = registry().find(handle);
    if (!entry) refuse(op, argument, handle);
    communicator = std::exchange(entry->communicator, nullptr);
  }
  release(communicator);
}

}  // namespace abiding::peer

abiding::peer::Communicator* abiding_peer_acquire(abiding::peer::Handle handle) {
  return abiding::peer::acquire(handle);
}
void abiding_peer_release(abiding::peer::Communicator* communicator) { abiding::peer::release(communicator); }
void abiding_peer_use_python(const abiding::peer::Python* python) { abiding::peer::python.store(python); }
