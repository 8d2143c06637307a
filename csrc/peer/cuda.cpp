// Memory that GPUs share through CUDA IPC.
#include "common/cuda.h"

#include <cuda_runtime_api.h>

#include <cstring>

#include "peer/communicator.h"

namespace abiding::peer {
namespace {

// Lets this thread allocate while another thread of the process captures a graph.
class RelaxedCapture {
 public:
  RelaxedCapture() { STD_CUDA_CHECK(cudaThreadExchangeStreamCaptureMode(&mode_)); }
  ~RelaxedCapture() { cudaThreadExchangeStreamCaptureMode(&mode_); }

 private:
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
};

static_assert(sizeof(cudaIpcMemHandle_t) == kMemoryHandleBytes);

void clear(void* at, int64_t bytes) {
  const RelaxedCapture relaxed;
  STD_CUDA_CHECK(cudaMemset(at, 0, static_cast<size_t>(bytes)));
  STD_CUDA_CHECK(cudaDeviceSynchronize());
}

// Refuses an argument by what CUDA says of it.
template <class... Parts>
void check_cuda(cudaError_t error, const char* op, const Parts&... parts) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // so that no later check reports it again
  fail(op, parts...);
}

void* allocate(const char* op, int64_t bytes, uint8_t* memory_handle) {
  const RelaxedCapture relaxed;
  void* memory = nullptr;
  const cudaError_t error = cudaMalloc(&memory, static_cast<size_t>(bytes));
  check_cuda(error, op, "size is ", bytes, " bytes, which CUDA does not allocate: ", cudaGetErrorString(error),
             "; expected less, or more free memory on the GPU");
  try {
    clear(memory, bytes);
    cudaIpcMemHandle_t ipc;
    STD_CUDA_CHECK(cudaIpcGetMemHandle(&ipc, memory));
    std::memcpy(memory_handle, &ipc, sizeof ipc);
  } catch (...) {
    cudaFree(memory);
    throw;
  }
  return memory;
}

void* open(const char* op, const uint8_t* memory_handle, int64_t*) {
  cudaIpcMemHandle_t ipc;
  std::memcpy(&ipc, memory_handle, sizeof ipc);
  void* memory = nullptr;
  const cudaError_t error = cudaIpcOpenMemHandle(&memory, ipc, cudaIpcMemLazyEnablePeerAccess);
  check_cuda(error, op, "mem_handle is not opened by CUDA: ", cudaGetErrorString(error),
             "; expected the handle of memory of another running process, on a GPU that this one can reach");
  return memory;
}

void close(void* opened) { STD_CUDA_CHECK(cudaIpcCloseMemHandle(opened)); }
void free(void* allocated) { STD_CUDA_CHECK(cudaFree(allocated)); }

FaultRecord* new_record() {
  const RelaxedCapture relaxed;
  void* record = nullptr;
  STD_CUDA_CHECK(cudaHostAlloc(&record, sizeof(FaultRecord), cudaHostAllocPortable | cudaHostAllocMapped));
  std::memset(record, 0, sizeof(FaultRecord));
  return static_cast<FaultRecord*>(record);
}
void free_record(FaultRecord* record) { STD_CUDA_CHECK(cudaFreeHost(record)); }

Header* header(const Communicator& communicator, int rank) {
  return reinterpret_cast<Header*>(communicator.workspaces[rank]);
}

void send_probes(const Communicator& communicator) {
  const uint32_t mark = static_cast<uint32_t>(communicator.rank) + 1;
  for (int r = 0; r < communicator.ranks; ++r)
    STD_CUDA_CHECK(
        cudaMemcpy(&header(communicator, r)->probes[communicator.rank], &mark, sizeof mark, cudaMemcpyDefault));
  STD_CUDA_CHECK(cudaDeviceSynchronize());
}

// Tells the ranks that know of no fault yet: the first one is the cause. On a stream of its own: other streams hold
// kernels that wait for ranks.
void announce(const Communicator& communicator, Fault fault) {
  const RelaxedCapture relaxed;
  cudaStream_t stream = nullptr;
  STD_CUDA_CHECK(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  const uint32_t poison = poison_word(fault, communicator.rank, communicator.rank);
  cudaError_t error = cudaSuccess;
  uint32_t known[kMaxRanks];
  for (int r = 0; r < communicator.ranks && error == cudaSuccess; ++r)
    error = cudaMemcpyAsync(&known[r], &header(communicator, r)->poison, sizeof poison, cudaMemcpyDefault, stream);
  if (error == cudaSuccess) error = cudaStreamSynchronize(stream);
  for (int r = 0; r < communicator.ranks && error == cudaSuccess; ++r)
    if (known[r] == 0)
      error = cudaMemcpyAsync(&header(communicator, r)->poison, &poison, sizeof poison, cudaMemcpyDefault, stream);
  if (error == cudaSuccess) error = cudaStreamSynchronize(stream);
  cudaStreamDestroy(stream);
  STD_CUDA_CHECK(error);
}

void read(void* to, const void* from, int64_t bytes) {
  STD_CUDA_CHECK(cudaDeviceSynchronize());
  STD_CUDA_CHECK(cudaMemcpy(to, from, static_cast<size_t>(bytes), cudaMemcpyDefault));
}

Communicator* (*acquire_communicator)(Handle) = nullptr;
void (*release_communicator)(Communicator*) = nullptr;
bool (*owns_address)(int64_t, bool, int64_t) = nullptr;

}  // namespace

Communicator* acquire(Handle handle) { return acquire_communicator ? acquire_communicator(handle) : nullptr; }
void release(Communicator* communicator) { release_communicator(communicator); }
bool owns(int64_t address, bool is_cuda, int64_t bytes) { return owns_address(address, is_cuda, bytes); }

const MemoryBackend* cuda_memory_backend() {
  static const MemoryBackend memory = [] {
    MemoryBackend m{};
    m.is_cuda = true;
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
  return &memory;
}

}  // namespace abiding::peer

// How the Python loader introduces the two binaries to each other: takes the CPU binary's abiding_peer_acquire,
// abiding_peer_release and abiding_peer_owns, returns what its abiding_peer_use_cuda takes.
extern "C" __attribute__((visibility("default"))) const abiding::peer::MemoryBackend* abiding_cuda_connect(
    abiding::peer::Communicator* (*acquire)(abiding::peer::Handle), void (*release)(abiding::peer::Communicator*),
    bool (*owns)(int64_t, bool, int64_t)) {
  using namespace abiding::peer;
  acquire_communicator = acquire;
  release_communicator = release;
  owns_address = owns;
  return cuda_memory_backend();
}
