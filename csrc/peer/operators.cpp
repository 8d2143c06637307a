// The operators that make, steer and end a communicator, which every collective takes by its handle.
#include <algorithm>
#include <tuple>

#include "common/registration.h"
#include "peer/buffers.h"
#include "peer/fault.h"
#include "peer/host.h"

namespace abiding::peer {
namespace {

const MemoryBackend& require_cuda_memory_backend(const char* op, const char* argument) {
  const MemoryBackend* memory = cuda_memory_backend();
  check(memory != nullptr, op, argument,
        " is of CUDA memory, and abiding's CUDA binary is not loaded; expected host "
        "memory, or a build with CUDA under a torch with CUDA");
  return *memory;
}

// --- memory

std::tuple<int64_t, Tensor> allocate(const char* op, const MemoryBackend& memory, int64_t size) {
  check(size > 0, op, "size is ", size, "; expected a number of bytes, 1 or more");
  Tensor handle = torch::stable::empty({kMemoryHandleBytes}, torch::headeronly::ScalarType::Byte);
  void* allocated = memory.allocate(op, size, static_cast<uint8_t*>(handle.mutable_data_ptr()));
  return {add_buffer(memory, allocated, size, false), handle};
}

std::tuple<int64_t, Tensor> allocate_shared_buffer_and_handle(int64_t size) {
  const char* op = "allocate_shared_buffer_and_handle";
  return allocate(op, require_cuda_memory_backend(op, "size"), size);
}
std::tuple<int64_t, Tensor> allocate_shared_memory_and_handle(int64_t size) {
  return allocate("allocate_shared_memory_and_handle", cpu_memory_backend(), size);
}

int64_t open_mem_handle(const Tensor& mem_handle) {
  const char* op = "open_mem_handle";
  const Argument handle{op, "mem_handle", mem_handle};
  handle.dtype({DType::kUint8}).contiguous();
  check(mem_handle.numel() == kMemoryHandleBytes, op, "mem_handle has shape ", handle.shape(), "; expected [",
        kMemoryHandleBytes, "]");
  const auto* bytes = static_cast<const uint8_t*>(mem_handle.const_data_ptr());
  const MemoryBackend& memory =
      is_cpu_memory_handle(bytes) ? cpu_memory_backend() : require_cuda_memory_backend(op, "mem_handle");
  int64_t size = -1;
  void* const opened = memory.open(op, bytes, &size);
  return add_buffer(memory, opened, size, true);
}

void close_mem_handle(int64_t ptr) { remove_buffer("close_mem_handle", ptr, true); }
void free_shared_buffer(int64_t ptr) { remove_buffer("free_shared_buffer", ptr, false); }

// --- a communicator's life

int64_t meta_size() { return kWorkspaceBytes; }

// The buffer at ipc_tensors[r].
std::shared_ptr<Buffer> require_buffer(const char* op, const std::vector<int64_t>& ipc_tensors, int64_t r,
                                       bool is_cuda) {
  auto buffer = find_buffer(ipc_tensors[r], is_cuda);
  check(buffer != nullptr, op, "ipc_tensors[", r, "] is ", ipc_tensors[r], "; expected the address of ",
        is_cuda ? "CUDA" : "host", " memory that this process has allocated or opened by these operators");
  return buffer;
}

int64_t init_custom_ar(const std::vector<int64_t>& ipc_tensors, const Tensor& rank_data, int64_t rank, bool) {
  const char* op = "init_custom_ar";
  const auto ranks = static_cast<int64_t>(ipc_tensors.size());
  check(1 <= ranks && ranks <= kMaxRanks, op, "ipc_tensors has ", ranks, " entries; expected one for each of 1 to ",
        kMaxRanks, " ranks");
  check(0 <= rank && rank < ranks, op, "rank is ", rank, "; expected 0 or more and less than ", ranks);
  auto communicator = std::make_unique<Communicator>();
  communicator->rank = static_cast<int>(rank);
  communicator->ranks = static_cast<int>(ranks);
  communicator->memory = rank_data.is_cuda() ? &require_cuda_memory_backend(op, "rank_data") : &cpu_memory_backend();
  for (int64_t r = 0; r < ranks; ++r) {
    const auto first = std::find(ipc_tensors.begin(), ipc_tensors.end(), ipc_tensors[r]) - ipc_tensors.begin();
    check(first == r, op, "ipc_tensors[", r, "] is ", ipc_tensors[r], ", as ipc_tensors[", first,
          "]; expected memory of its own for each rank");
    const auto buffer = require_buffer(op, ipc_tensors, r, rank_data.is_cuda());
    check(buffer->holds(kWorkspaceBytes), op, "ipc_tensors[", r, "] has ", buffer->bytes,
          " bytes; expected meta_size() or more, ", kWorkspaceBytes);
    communicator->workspaces[r] = reinterpret_cast<uint8_t*>(ipc_tensors[r]);
    communicator->buffers.push_back(buffer);
  }
  // The workspace may have served another communicator.
  auto* own = reinterpret_cast<Header*>(communicator->workspaces[rank]);
  communicator->memory->clear(&own->departed, sizeof own->departed + sizeof own->reporting);
  communicator->record = communicator->memory->new_record();
  return add(std::move(communicator));
}

void announce_closed(int64_t fa) {
  const CommunicatorRef communicator("announce_closed", "fa", fa);
  communicator->memory->announce(*communicator, Fault::kClosed);
}
void announce_interrupted(int64_t fa) {
  const CommunicatorRef communicator("announce_interrupted", "fa", fa);
  communicator->memory->announce(*communicator, Fault::kInterrupted);
}

// Compares a call that goes through torch.distributed with those of the other ranks, of which some may wait for its
// message at peer memory: an epoch of tags alone. Not for GPUs: whatever a kernel found, the host would already have
// entered the other library's collective.
void announce_call(int64_t fa, const Tensor& message) {
  const char* op = "announce_call";
  with_communicator(op, "fa", fa, "message", message, [&](const Communicator& communicator) {
    const Argument argument{op, "message", message};
    const Peers peers = communicator.peers({Op::kAllReduce, argument.dtype(), message.numel() | kElsewhere});
    HostCallScope<HostAccess> scope(peers, kDirect);
    if (scope.ok() && scope.receive_tags()) scope.end();
  });
}

void dispose(int64_t fa) {
  if (Communicator* communicator = acquire(fa)) {
    if (!communicator->memory->is_cuda) communicator->memory->announce(*communicator, Fault::kClosed);
    release(communicator);
  }
  remove("dispose", "fa", fa);
}

// Messages are never sent from a caller's own memory, so there is nothing to register. Engines call these all the same.
void register_buffer(int64_t fa, const std::vector<int64_t>& ipc_tensors) {
  const char* op = "register_buffer";
  const CommunicatorRef communicator(op, "fa", fa);
  const int ranks = communicator->ranks;
  check(static_cast<int>(ipc_tensors.size()) == ranks, op, "ipc_tensors has ", ipc_tensors.size(),
        " entries; expected one for each of ", ranks, " ranks");
  for (int64_t r = 0; r < ranks; ++r) require_buffer(op, ipc_tensors, r, communicator->memory->is_cuda);
}
std::tuple<std::vector<int64_t>, std::vector<int64_t>> get_graph_buffer_ipc_meta(int64_t fa) {
  const CommunicatorRef communicator("get_graph_buffer_ipc_meta", "fa", fa);
  return {};
}
void register_graph_buffers(int64_t fa, const std::vector<std::vector<int64_t>>& handles,
                            const std::vector<std::vector<int64_t>>& offsets) {
  const auto ranks = static_cast<size_t>(CommunicatorRef("register_graph_buffers", "fa", fa)->ranks);
  check(handles.size() == ranks && offsets.size() == ranks, "register_graph_buffers", "handles and offsets have ",
        handles.size(), " and ", offsets.size(), " entries; expected one for each of ", ranks, " ranks");
}

void configure(int64_t fa, double timeout_s, int64_t max_blocks, int64_t one_shot_bytes) {
  const CommunicatorRef communicator("configure", "fa", fa);
  check(timeout_s > 0 && timeout_s < 1e9, "configure", "timeout_s is ", timeout_s,
        "; expected seconds, more than 0 and less than 1e9");
  check(1 <= max_blocks && max_blocks <= kMaxCtas, "configure", "max_blocks is ", max_blocks,
        "; expected 1 or more and at most ", kMaxCtas);
  check(one_shot_bytes >= -1, "configure", "one_shot_bytes is ", one_shot_bytes,
        "; expected -1 for the default, or a number of bytes");
  communicator->timeout_ns = static_cast<uint64_t>(timeout_s * 1e9);
  communicator->max_ctas = static_cast<int>(max_blocks);
  communicator->one_shot_bytes = one_shot_bytes;
}

// --- faults and probes

const Header* own_header(const Communicator& communicator) {
  return reinterpret_cast<const Header*>(communicator.workspaces[communicator.rank]);
}

// What another rank has written, for a rank without a fault of its own in its record. On a GPU this waits for queued
// work, so it is done only on request. 0: nothing.
uint32_t poison_from_others(const Communicator& communicator, bool look) {
  if (!look && communicator.memory->is_cuda) return 0;
  uint32_t poison = 0;
  communicator.memory->read(&poison, &own_header(communicator)->poison, sizeof poison);
  return poison;
}

// {kind, op, epoch, CTA, rank, waited ms, found by}, or nothing.
std::vector<int64_t> fault(int64_t fa, bool look) {
  const CommunicatorRef communicator("fault", "fa", fa);
  if (has_stopped(*communicator)) {
    const FaultRecord& r = *communicator->record;
    const auto op = static_cast<int64_t>(r.op), waited_ms = static_cast<int64_t>(r.waited_ns / 1'000'000);
    return {r.fault, op, r.epoch, r.cta, r.rank, waited_ms, r.found_by};
  }
  const uint32_t poison = poison_from_others(*communicator, look);
  if (poison == 0) return {};
  return {fault_of(poison), -1, 0, 0, culprit_of(poison), 0, finder_of(poison)};
}

// The same as the text of an error; "" for nothing.
std::string fault_text(int64_t fa, bool look) {
  const CommunicatorRef communicator("fault_text", "fa", fa);
  const FaultRecord* record = has_stopped(*communicator) ? communicator->record : nullptr;
  const uint32_t poison = record ? poison_of(*record) : poison_from_others(*communicator, look);
  if (poison == 0) return {};
  const std::string op = std::string("abiding::") + (record ? op_name(record->op) : "check") + ": ";
  if (record) return op + describe(poison, record->calls, record);
  CallTag calls[2];
  for (int i = 0; i < 2; ++i)
    communicator->memory->read(
        &calls[i], &own_header(*communicator)->calls[(i ? finder_of(poison) : culprit_of(poison)) % kMaxRanks],
        sizeof calls[i]);
  return op + describe(poison, calls, nullptr);
}

void clear(int64_t fa) {
  const CommunicatorRef communicator("clear", "fa", fa);
  communicator->memory->clear(communicator->workspaces[communicator->rank], kWorkspaceBytes);
  *communicator->record = {};
}

void probe_send(int64_t fa) {
  const CommunicatorRef communicator("probe_send", "fa", fa);
  communicator->memory->send_probes(*communicator);
}
std::vector<int64_t> probe_missing(int64_t fa) {
  const CommunicatorRef communicator("probe_missing", "fa", fa);
  uint32_t probes[kMaxRanks];
  communicator->memory->read(probes, own_header(*communicator)->probes, sizeof(uint32_t) * communicator->ranks);
  std::vector<int64_t> missing;
  for (int r = 0; r < communicator->ranks; ++r)
    if (probes[r] != static_cast<uint32_t>(r) + 1) missing.push_back(r);
  return missing;
}

}  // namespace

ABIDING_KERNELS(abiding_custom_ar, CPU, peer, m) {
  m.impl("announce_call", ABIDING_BOX(announce_call));
  m.impl("init_custom_ar", ABIDING_BOX(init_custom_ar));
  m.impl("open_mem_handle", ABIDING_BOX(open_mem_handle));
}
// Its kernels run on the host on behalf of a tensor on the GPU, so the CUDA binary need not have it.
ABIDING_KERNELS(abiding_custom_ar, CUDA, peer, m) { m.impl("init_custom_ar", ABIDING_BOX(init_custom_ar)); }
ABIDING_KERNELS(abiding_custom_ar, CompositeExplicitAutograd, peer, m) {
  m.impl("announce_closed", ABIDING_BOX(announce_closed));
  m.impl("announce_interrupted", ABIDING_BOX(announce_interrupted));
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
  m.impl("fault_text", ABIDING_BOX(fault_text));
  m.impl("clear", ABIDING_BOX(clear));
  m.impl("probe_send", ABIDING_BOX(probe_send));
  m.impl("probe_missing", ABIDING_BOX(probe_missing));
}

}  // namespace abiding::peer
