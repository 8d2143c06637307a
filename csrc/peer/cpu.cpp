// The registry of communicators, and memory that processes of one host share.
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cstring>
#include <map>
#include <mutex>
#include <string>
#include <utility>

#include "peer/communicator.h"

namespace abiding::peer {
namespace {

// Places are used again, each time under the next generation.
struct Place {
  std::unique_ptr<Communicator> communicator;
  uint32_t generation = 0;
};

struct Registry {
  std::mutex mutex;
  std::vector<Place> places;

  // Null: no open communicator has this handle. To be called with the mutex held.
  Place* place(Handle handle) {
    const uint64_t index = static_cast<uint64_t>(handle) & 0xFFFFFFFF, generation = static_cast<uint64_t>(handle) >> 32;
    if (index >= places.size() || places[index].generation != generation) return nullptr;
    return places[index].communicator ? &places[index] : nullptr;
  }
};

// Kept for the life of the process, as operators are.
Registry& registry() {
  static auto* const one = new Registry;
  return *one;
}

std::atomic<const Memory*> cuda{nullptr};

// A file in memory alone. It has no name that could outlive its processes: the kernel frees it when the last of them has let
// go, however they end. Others find it through its owner, which keeps the file open for that; and unlike files in /dev/shm
// it is not subject to the small limit that containers set there.
struct FileHandle {
  char kind[8];
  uint32_t pid;
  int32_t file;
  uint64_t inode;
  int64_t bytes;
  uint8_t unused[32];
};
static_assert(sizeof(FileHandle) == kHandleBytes);
constexpr char kFileHandle[8] = "cpu-mem";

struct Mapping {
  int64_t bytes;
  int file;  // -1: another process's
};

struct Mappings {
  std::mutex mutex;
  std::map<void*, Mapping> all;
};

Mappings& mappings() {
  static auto* const one = new Mappings;
  return *one;
}

// Closes a file that nobody came to own.
struct File {
  int number;
  ~File() {
    if (number >= 0) ::close(number);
  }
  int release() { return std::exchange(number, -1); }
};

void* map(int file, int64_t bytes, bool own) {
  void* at = mmap(nullptr, static_cast<size_t>(bytes), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, file, 0);
  check(at != MAP_FAILED, "peer", "size is ", bytes, " bytes, which cannot be mapped: ", std::strerror(errno),
        "; expected that much address space");
  std::lock_guard lock(mappings().mutex);
  mappings().all[at] = {bytes, own ? file : -1};
  return at;
}

void unmap(void* at, bool own) {
  Mapping mapping;
  {
    std::lock_guard lock(mappings().mutex);
    const auto found = mappings().all.find(at);
    check(found != mappings().all.end() && (found->second.file >= 0) == own, "peer", "pointer ", at,
          " is unknown; expected one that was ", own ? "allocated" : "opened", " here and not let go since");
    mapping = found->second;
    mappings().all.erase(found);
  }
  munmap(at, static_cast<size_t>(mapping.bytes));
  if (own) ::close(mapping.file);
}

// Peers look up whether the owner still runs.
void sign(void* workspace, int64_t bytes) {
  if (bytes >= static_cast<int64_t>(sizeof(Header)))
    static_cast<Header*>(workspace)->pid = static_cast<uint32_t>(getpid());
}

void* allocate(int64_t bytes, uint8_t* handle) {
  check(bytes > 0, "peer", "size is ", bytes, "; expected more than 0 bytes");
  File file{memfd_create("abiding", MFD_CLOEXEC | MFD_ALLOW_SEALING)};
  struct stat status{};
  const bool made = file.number >= 0 && ftruncate(file.number, bytes) == 0 &&
                    fcntl(file.number, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL) == 0 &&
                    fstat(file.number, &status) == 0;
  check(made, "peer", "size is ", bytes, " bytes, which cannot be shared: ", std::strerror(errno), "; expected less");
  void* at = map(file.number, bytes, true);
  sign(at, bytes);
  FileHandle name{};
  std::memcpy(name.kind, kFileHandle, sizeof kFileHandle);
  name.pid = static_cast<uint32_t>(getpid());
  name.file = file.release();
  name.inode = status.st_ino;
  name.bytes = bytes;
  std::memcpy(handle, &name, sizeof name);
  return at;
}

void* open(const uint8_t* handle) {
  FileHandle name;
  std::memcpy(&name, handle, sizeof name);
  check(is_cpu_handle(handle), "peer",
        "handle is of another kind; expected one of memory that a process of this host shares");
  const std::string path = "/proc/" + std::to_string(name.pid) + "/fd/" + std::to_string(name.file);
  const File file{::open(path.c_str(), O_RDWR | O_CLOEXEC)};
  const int error = errno;
  struct stat status{};
  check(file.number >= 0, "peer", "handle leads to ", path, ", which does not open: ", std::strerror(error),
        "; expected a running process of this user and container");
  check(fstat(file.number, &status) == 0 && status.st_ino == name.inode && status.st_size == name.bytes, "peer",
        "handle leads to ", path, ", which is now another file; expected memory that its owner has not freed");
  return map(file.number, name.bytes, false);
}

void close(void* opened) { unmap(opened, false); }
void free(void* allocated) { unmap(allocated, true); }

void clear(void* at, int64_t bytes) {
  {
    std::lock_guard lock(mappings().mutex);
    const auto found = mappings().all.find(at);
    // Pages that nobody has used are not made by clearing them.
    if (found != mappings().all.end() && found->second.bytes == bytes &&
        madvise(at, static_cast<size_t>(bytes), MADV_REMOVE) == 0) {
      if (found->second.file >= 0) sign(at, bytes);
      return;
    }
  }
  std::memset(at, 0, static_cast<size_t>(bytes));
}

FaultRecord* new_record() { return new FaultRecord{}; }
void free_record(FaultRecord* record) { delete record; }

uint32_t* probe(uint8_t* workspace, int rank) { return &reinterpret_cast<Header*>(workspace)->probes[rank]; }

void send_probes(const Communicator& c) {
  for (int r = 0; r < c.ranks; ++r)
    __atomic_store_n(probe(c.workspaces[r], c.rank), static_cast<uint32_t>(c.rank) + 1, __ATOMIC_RELAXED);
}

void read(void* to, const void* from, int64_t bytes) { std::memcpy(to, from, static_cast<size_t>(bytes)); }

}  // namespace

Communicator* find(Handle handle) {
  std::lock_guard lock(registry().mutex);
  Place* place = registry().place(handle);
  return place ? place->communicator.get() : nullptr;
}

Handle add(const Communicator& communicator) {
  std::lock_guard lock(registry().mutex);
  std::vector<Place>& places = registry().places;
  size_t index = 0;
  while (index < places.size() && places[index].communicator) ++index;
  if (index == places.size()) places.emplace_back();
  Place& place = places[index];
  place.communicator = std::make_unique<Communicator>(communicator);
  place.generation = (place.generation + 1) & 0x7FFFFFFF;
  if (place.generation == 0) place.generation = 1;  // so that no handle is a small number
  return static_cast<Handle>(place.generation) << 32 | static_cast<Handle>(index);
}

std::unique_ptr<Communicator> remove(const char* op, const char* argument, Handle handle) {
  std::lock_guard lock(registry().mutex);
  Place* place = registry().place(handle);
  if (!place) refuse(op, argument, handle);
  return std::move(place->communicator);
}

const Memory& cpu_memory() {
  static constexpr Memory memory{allocate, open, close, free, clear, new_record, free_record, send_probes, read};
  return memory;
}

bool is_cpu_handle(const uint8_t* handle) { return std::memcmp(handle, kFileHandle, sizeof kFileHandle) == 0; }

const Memory* cuda_memory() { return cuda.load(); }

}  // namespace abiding::peer

abiding::peer::Communicator* abiding_peer_find(abiding::peer::Handle handle) { return abiding::peer::find(handle); }
void abiding_peer_use_cuda(const abiding::peer::Memory* memory) { abiding::peer::cuda.store(memory); }
