#include "common/cpu.h"

#include <map>
#include <mutex>

#include "all_reduce/operators.h"
#include "peer/host.h"

namespace abiding::all_reduce {
namespace {

using peer::find_or_fail;
using peer::Memory;

struct Backend : CpuScope {
  static constexpr bool kBlocking = true;
  using CpuScope::CpuScope;
  static const Memory* memory() { return &peer::cpu_memory(); }

  static int64_t capacity(const Communicator&, Algorithm) { return INT64_MAX; }  // it takes its own rounds
  static void all_reduce(const Communicator& communicator, const AllReduceParams& p, Algorithm) {
    peer::all_reduce(communicator.peers(), p.input, p.out, p.numel, p.dtype);
  }
};

const Memory& cuda_memory(const char* op) {
  const Memory* memory = peer::cuda_memory();
  check(memory != nullptr, op,
        "CUDA memory is not to be had, as abiding's CUDA binary is not loaded; expected a CUDA build");
  return *memory;
}

// Which memory an address came from, and how: the address alone does not tell.
struct Origin {
  const Memory* memory;
  bool opened;
};
std::mutex origins_mutex;
std::map<int64_t, Origin> origins;

int64_t remember(void* address, Origin origin) {
  std::lock_guard lock(origins_mutex);
  origins[reinterpret_cast<int64_t>(address)] = origin;
  return reinterpret_cast<int64_t>(address);
}
const Memory& forget(const char* op, int64_t ptr, bool opened) {
  std::lock_guard lock(origins_mutex);
  const auto found = origins.find(ptr);
  check(found != origins.end() && found->second.opened == opened, op, "ptr is ", ptr, "; expected what ",
        opened ? "open_mem_handle" : "allocate_shared_buffer_and_handle", " returned, once");
  const Memory& memory = *found->second.memory;
  origins.erase(found);
  return memory;
}

Tensor handle_tensor() { return torch::stable::empty({peer::kHandleBytes}, torch::headeronly::ScalarType::Byte); }

std::tuple<int64_t, Tensor> allocate(const char* op, const Memory& memory, int64_t size) {
  check(size > 0, op, "size is ", size, "; expected a number of bytes, 1 or more");
  Tensor handle = handle_tensor();
  void* allocated = memory.allocate(size, static_cast<uint8_t*>(handle.mutable_data_ptr()));
  return {remember(allocated, {&memory, false}), handle};
}

std::tuple<int64_t, Tensor> allocate_shared_buffer_and_handle(int64_t size) {
  const char* op = "allocate_shared_buffer_and_handle";
  return allocate(op, cuda_memory(op), size);
}
std::tuple<int64_t, Tensor> allocate_shared_memory_and_handle(int64_t size) {
  return allocate("allocate_shared_memory_and_handle", peer::cpu_memory(), size);
}

int64_t open_mem_handle(const Tensor& mem_handle) {
  const char* op = "open_mem_handle";
  const Argument handle{op, "mem_handle", mem_handle};
  handle.dtype({DType::kUint8}).contiguous();
  check(mem_handle.numel() == peer::kHandleBytes, op, "mem_handle has shape ", handle.shape(), "; expected [",
        peer::kHandleBytes, "]");
  const auto* bytes = static_cast<const uint8_t*>(mem_handle.const_data_ptr());
  const Memory& memory = peer::is_cpu_handle(bytes) ? peer::cpu_memory() : cuda_memory(op);
  return remember(memory.open(bytes), {&memory, true});
}

void close_mem_handle(int64_t ptr) { forget("close_mem_handle", ptr, true).close(reinterpret_cast<void*>(ptr)); }
void free_shared_buffer(int64_t ptr) { forget("free_shared_buffer", ptr, false).free(reinterpret_cast<void*>(ptr)); }

int64_t init_custom_ar(const std::vector<int64_t>& ipc_tensors, const Tensor& rank_data, int64_t rank, bool) {
  const char* op = "init_custom_ar";
  const auto ranks = static_cast<int64_t>(ipc_tensors.size());
  check(1 <= ranks && ranks <= peer::kMaxRanks, op, "ipc_tensors has ", ranks,
        " entries; expected one for each of 1 to ", peer::kMaxRanks, " ranks");
  check(0 <= rank && rank < ranks, op, "rank is ", rank, "; expected 0 or more and less than ", ranks);
  Communicator communicator{};
  communicator.rank = static_cast<int>(rank);
  communicator.ranks = static_cast<int>(ranks);
  for (int64_t r = 0; r < ranks; ++r) {
    check(ipc_tensors[r] != 0, op, "ipc_tensors[", r, "] is 0; expected the address of a workspace");
    communicator.workspaces[r] = reinterpret_cast<uint8_t*>(ipc_tensors[r]);
  }
  communicator.memory = rank_data.is_cuda() ? &cuda_memory(op) : &peer::cpu_memory();
  communicator.record = communicator.memory->new_record();
  auto* own = reinterpret_cast<peer::Header*>(communicator.workspaces[rank]);  // may have served another communicator
  communicator.memory->clear(&own->reporting, sizeof own->reporting);
  return peer::add(communicator);
}

void dispose(int64_t fa) {
  const auto communicator = peer::remove("dispose", "fa", fa);
  communicator->memory->free_record(communicator->record);
}

int64_t meta_size() { return peer::kWorkspaceBytes; }

// Messages never leave from a caller's own memory, so there is nothing to register; the calls are checked all the same.
void register_buffer(int64_t fa, const std::vector<int64_t>& ipc_tensors) {
  const Communicator& communicator = find_or_fail("register_buffer", "fa", fa);
  check(static_cast<int>(ipc_tensors.size()) == communicator.ranks, "register_buffer", "ipc_tensors has ",
        ipc_tensors.size(), " entries; expected one for each of ", communicator.ranks, " ranks");
}
std::tuple<std::vector<int64_t>, std::vector<int64_t>> get_graph_buffer_ipc_meta(int64_t fa) {
  find_or_fail("get_graph_buffer_ipc_meta", "fa", fa);
  return {};
}
void register_graph_buffers(int64_t fa, const std::vector<std::vector<int64_t>>& handles,
                            const std::vector<std::vector<int64_t>>& offsets) {
  const auto ranks = static_cast<size_t>(find_or_fail("register_graph_buffers", "fa", fa).ranks);
  check(handles.size() == ranks && offsets.size() == ranks, "register_graph_buffers", "handles and offsets have ",
        handles.size(), " and ", offsets.size(), " entries; expected one for each of ", ranks, " ranks");
}

void configure(int64_t fa, double timeout_s, int64_t max_blocks, int64_t one_shot_bytes) {
  Communicator& communicator = find_or_fail("configure", "fa", fa);
  check(timeout_s > 0 && timeout_s < 1e9, "configure", "timeout_s is ", timeout_s, "; expected seconds, more than 0");
  check(1 <= max_blocks && max_blocks <= peer::kMaxBlocks, "configure", "max_blocks is ", max_blocks,
        "; expected 1 or more and at most ", peer::kMaxBlocks);
  check(one_shot_bytes >= -1, "configure", "one_shot_bytes is ", one_shot_bytes,
        "; expected -1 for the default, or a number of bytes");
  communicator.timeout_ns = static_cast<uint64_t>(timeout_s * 1e9);
  communicator.max_blocks = static_cast<int>(max_blocks);
  communicator.one_shot_bytes = one_shot_bytes;
}

const peer::Header* own_header(const Communicator& communicator) {
  return reinterpret_cast<const peer::Header*>(communicator.workspaces[communicator.rank]);
}

// {kind, op, epoch, block, rank, waited ms, found by}, or nothing. A rank that was told of a fault but has not called since
// knows it from its workspace alone; looking there waits for a GPU's queued work.
std::vector<int64_t> fault(int64_t fa, bool look) {
  const Communicator& communicator = find_or_fail("fault", "fa", fa);
  const peer::Fault fault = peer::fault_of(communicator);
  const peer::FaultRecord& record = *communicator.record;
  if (fault != peer::Fault::kNone)
    return {static_cast<int64_t>(fault),
            static_cast<int64_t>(record.op),
            record.epoch,
            record.block,
            record.rank,
            static_cast<int64_t>(record.waited_ns / 1'000'000),
            record.found_by};
  if (!look && communicator.memory != &peer::cpu_memory()) return {};
  uint32_t poison = 0;
  communicator.memory->read(&poison, &own_header(communicator)->poison, sizeof poison);
  if (poison == 0) return {};
  return {poison & 0xFF, -1, 0, 0, poison >> 8 & 0xFF, 0, poison >> 16};
}

void clear(int64_t fa) {
  const Communicator& communicator = find_or_fail("clear", "fa", fa);
  communicator.memory->clear(communicator.workspaces[communicator.rank], peer::kWorkspaceBytes);
  *communicator.record = {};
}

void probe_send(int64_t fa) {
  const Communicator& communicator = find_or_fail("probe_send", "fa", fa);
  communicator.memory->send_probes(communicator);
}
std::vector<int64_t> probe_missing(int64_t fa) {
  const Communicator& communicator = find_or_fail("probe_missing", "fa", fa);
  uint32_t probes[peer::kMaxRanks];
  communicator.memory->read(probes, own_header(communicator)->probes, sizeof(uint32_t) * communicator.ranks);
  std::vector<int64_t> missing;
  for (int r = 0; r < communicator.ranks; ++r)
    if (probes[r] != static_cast<uint32_t>(r) + 1) missing.push_back(r);
  return missing;
}

}  // namespace

ABIDING_KERNELS(abiding_custom_ar, CPU, all_reduce, m) {
  m.impl("init_custom_ar", ABIDING_BOX(init_custom_ar));
  m.impl("open_mem_handle", ABIDING_BOX(open_mem_handle));
  Operators<Backend>::implement_raw(m);
}
ABIDING_KERNELS(abiding_custom_ar, CUDA, all_reduce_init, m) { m.impl("init_custom_ar", ABIDING_BOX(init_custom_ar)); }
ABIDING_KERNELS(abiding_custom_ar, CompositeExplicitAutograd, all_reduce, m) {
  m.impl("dispose", ABIDING_BOX(dispose));
  m.impl("meta_size", ABIDING_BOX(meta_size));
  m.impl("register_buffer", ABIDING_BOX(register_buffer));
  m.impl("get_graph_buffer_ipc_meta", ABIDING_BOX(get_graph_buffer_ipc_meta));
  m.impl("register_graph_buffers", ABIDING_BOX(register_graph_buffers));
  m.impl("allocate_shared_buffer_and_handle", ABIDING_BOX(allocate_shared_buffer_and_handle));
  m.impl("free_shared_buffer", ABIDING_BOX(free_shared_buffer));
  m.impl("allocate_shared_memory_and_handle", ABIDING_BOX(allocate_shared_memory_and_handle));
  m.impl("close_mem_handle", ABIDING_BOX(close_mem_handle));
  m.impl("configure", ABIDING_BOX(configure));
  m.impl("fault", ABIDING_BOX(fault));
  m.impl("clear", ABIDING_BOX(clear));
  m.impl("probe_send", ABIDING_BOX(probe_send));
  m.impl("probe_missing", ABIDING_BOX(probe_missing));
}
ABIDING_KERNELS(abiding, CPU, all_reduce, m) { Operators<Backend>::implement(m); }

}  // namespace abiding::all_reduce
