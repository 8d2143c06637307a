// Memory that processes of one host share.
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cstring>
#include <map>
#include <string>
#include <utility>

#include "peer/communicator.h"
#include "peer/tables.h"

namespace abiding::peer {
namespace {

std::atomic<const MemoryBackend*> cuda{nullptr};

// Names a memfd. It has no path that could outlive its processes: the kernel frees it when the last of them has closed
// and unmapped it, however they end. Other processes open it through /proc/<owner>/fd, so the owner keeps it open; and
// unlike files in /dev/shm it is not subject to the small limit that containers set there.
struct FileHandle {
  char kind[8];
  uint32_t pid;
  int32_t file;
  uint64_t inode;
  int64_t bytes;
  uint8_t unused[32];
};
static_assert(sizeof(FileHandle) == kMemoryHandleBytes);
constexpr char kFileHandle[8] = "cpu-mem";

struct Mapping {
  int64_t bytes;
  int file;  // -1: memory of another process, or one that was opened
};

// By address. Never destroyed, as the registry; tables_mutex() must be held.
std::map<void*, Mapping>& mappings() {
  static auto* const one = new std::map<void*, Mapping>;
  return *one;
}

// Closes the file unless it was released to another owner.
struct File {
  int number;
  ~File() {
    if (number >= 0) ::close(number);
  }
  int release() { return std::exchange(number, -1); }
};

// What an error of the operating system asks for.
const char* remedy(int error) {
  switch (error) {
    case EMFILE: return "a free descriptor of this process: raise `ulimit -n`, or close some";
    case ENFILE: return "a free descriptor of this host: raise fs.file-max";
    case EPERM:
    case EACCES:
      return "processes of one user, and a sandbox (seccomp, LSM) that permits memfd_create and /proc/<pid>/fd";
    case ENOSYS: return "a kernel and a sandbox that have memfd_create";
    default: return "less, or more memory and address space for this process";
  }
}

void* map(const char* op, const char* argument, int file, int64_t bytes, bool own) {
  void* at = mmap(nullptr, static_cast<size_t>(bytes), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, file, 0);
  check(at != MAP_FAILED, op, argument, " is of ", bytes, " bytes, which cannot be mapped: ", std::strerror(errno),
        "; expected ", remedy(errno));
  std::lock_guard lock(tables_mutex());
  mappings()[at] = {bytes, own ? file : -1};
  return at;
}

void unmap(void* at, bool own) {
  Mapping mapping;
  {
    std::lock_guard lock(tables_mutex());
    const auto found = mappings().find(at);
    check(found != mappings().end() && (found->second.file >= 0) == own, "peer", "pointer ", at,
          " is unknown; expected one that was ", own ? "allocated" : "opened", " here and not given back since");
    mapping = found->second;
    mappings().erase(found);
  }
  munmap(at, static_cast<size_t>(mapping.bytes));
  if (own) ::close(mapping.file);
}

// Peers that wait look up whether the owner still runs.
void write_owner_pid(void* workspace, int64_t bytes) {
  if (bytes >= static_cast<int64_t>(sizeof(Header)))
    static_cast<Header*>(workspace)->pid = static_cast<uint32_t>(getpid());
}

void* allocate(const char* op, int64_t bytes, uint8_t* memory_handle) {
  File file{memfd_create("abiding", MFD_CLOEXEC | MFD_ALLOW_SEALING)};
  struct stat status{};
  const bool made = file.number >= 0 && ftruncate(file.number, bytes) == 0 &&
                    fcntl(file.number, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL) == 0 &&
                    fstat(file.number, &status) == 0;
  check(made, op, "size is ", bytes, " bytes, which cannot be shared: ", std::strerror(errno), "; expected ",
        remedy(errno));
  void* at = map(op, "size", file.number, bytes, true);
  write_owner_pid(at, bytes);
  FileHandle name{};
  std::memcpy(name.kind, kFileHandle, sizeof kFileHandle);
  name.pid = static_cast<uint32_t>(getpid());
  name.file = file.release();
  name.inode = status.st_ino;
  name.bytes = bytes;
  std::memcpy(memory_handle, &name, sizeof name);
  return at;
}

void* open(const char* op, const uint8_t* memory_handle, int64_t* bytes) {
  FileHandle name;
  std::memcpy(&name, memory_handle, sizeof name);
  const std::string path = "/proc/" + std::to_string(name.pid) + "/fd/" + std::to_string(name.file);
  // Not a path of anybody's choice: a device or a pipe might not return from open().
  struct stat status{};
  File file{-1};
  int error = stat(path.c_str(), &status) == 0 ? 0 : errno;
  check(error != 0 || S_ISREG(status.st_mode), op, "mem_handle leads to ", path,
        ", which is no memory; expected memory that was allocated by these operators");
  if (error == 0) {
    file.number = ::open(path.c_str(), O_RDWR | O_CLOEXEC | O_NONBLOCK);
    error = errno;
  }
  check(file.number >= 0, op, "mem_handle leads to ", path, ", which does not open: ", std::strerror(error),
        "; expected ",
        error == ENOENT ? "a running process of this container that has not freed the memory" : remedy(error));
  check(fstat(file.number, &status) == 0 && status.st_ino == name.inode && status.st_size == name.bytes, op,
        "mem_handle leads to ", path, ", which is now another file; expected memory that its owner has not freed");
  // Of any other file the owner could take pages away, which would end this process at its next access.
  const int seals = fcntl(file.number, F_GET_SEALS);
  check(seals >= 0 && (seals & F_SEAL_SHRINK), op, "mem_handle leads to ", path,
        ", which is not sealed; expected memory that was allocated by these operators");
  *bytes = name.bytes;
  return map(op, "mem_handle", file.number, name.bytes, false);
}

void close(void* opened) { unmap(opened, false); }
void free(void* allocated) { unmap(allocated, true); }

void clear(void* at, int64_t bytes) {
  {
    std::lock_guard lock(tables_mutex());
    const auto found = mappings().find(at);
    // MADV_REMOVE drops the pages, where memset would allocate those that were never touched.
    if (found != mappings().end() && found->second.bytes == bytes &&
        madvise(at, static_cast<size_t>(bytes), MADV_REMOVE) == 0) {
      if (found->second.file >= 0) write_owner_pid(at, bytes);
      return;
    }
  }
  std::memset(at, 0, static_cast<size_t>(bytes));
}

FaultRecord* new_record() { return new FaultRecord{}; }
void free_record(FaultRecord* record) { delete record; }

void send_probes(const Communicator& c) {
  for (int r = 0; r < c.ranks; ++r)
    __atomic_store_n(&reinterpret_cast<Header*>(c.workspaces[r])->probes[c.rank], static_cast<uint32_t>(c.rank) + 1,
                     __ATOMIC_RELAXED);
}

void announce(const Communicator& c, Fault fault) {
  const auto header = [&](int rank) { return reinterpret_cast<Header*>(c.workspaces[rank]); };
  // Not poison: a rank may close as soon as it has sent its words, which others have yet to read. They look here while
  // they wait for this rank's words, and then once more for the words.
  if (fault == Fault::kClosed) return __atomic_store_n(&header(c.rank)->departed, 1, __ATOMIC_RELEASE);
  for (int r = 0; r < c.ranks; ++r) {
    uint32_t none = 0;
    __atomic_compare_exchange_n(&header(r)->poison, &none, poison_word(fault, c.rank, c.rank), false, __ATOMIC_RELAXED,
                                __ATOMIC_RELAXED);
  }
}

void read(void* to, const void* from, int64_t bytes) { std::memcpy(to, from, static_cast<size_t>(bytes)); }

}  // namespace

const MemoryBackend& cpu_memory_backend() {
  static const MemoryBackend memory = [] {
    MemoryBackend m{};
    m.is_cuda = false;
    m.allocate = allocate;
    m.open = open;
    m.close = close;
    m.free = free;
    m.clear = clear;
    m.new_record = new_record;
    m.free_record = free_record;
    m.send_probes = send_probes;
    m.announce = announce;
    m.read = read;
    return m;
  }();
  return memory;
}

bool is_cpu_memory_handle(const uint8_t* memory_handle) {
  return std::memcmp(memory_handle, kFileHandle, sizeof kFileHandle) == 0;
}

const MemoryBackend* cuda_memory_backend() { return cuda.load(); }

}  // namespace abiding::peer

void abiding_peer_use_cuda(const abiding::peer::MemoryBackend* memory) { abiding::peer::cuda.store(memory); }
