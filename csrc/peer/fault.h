// The fault of a communicator, the one sentence that says it, and the frame of a call that raises it.
#pragma once

#include <string>

#include "peer/communicator.h"

namespace abiding::peer {

inline const char* op_name(Op op) {
  switch (op) {
    case Op::kAllReduce: return "all_reduce";
    case Op::kRmsNorm: return "rms_norm";
    case Op::kQkNorm: return "qk_norm";
  }
  return "a call";
}

inline const char* fault_words(uint32_t fault) {
  switch (static_cast<Fault>(fault)) {
    case Fault::kTimeout: return " did not send in time";
    case Fault::kConcurrent: return " made two calls at once";
    case Fault::kGone: return " is gone";
    case Fault::kClosed: return " has closed";
    case Fault::kInterrupted: return " was interrupted";
    case Fault::kMismatch: return " made another call";
    case Fault::kNone: break;
  }
  return " stopped";
}

inline bool has_stopped(const Communicator& communicator) {
  const uint32_t fault = __atomic_load_n(&communicator.record->fault, __ATOMIC_ACQUIRE);
  return fault != static_cast<uint32_t>(Fault::kNone) && fault != kRecordInWriting;
}

// In the `count` of an all_reduce whose message goes through torch.distributed. No message has so many elements.
constexpr int64_t kElsewhere = int64_t{1} << 55;

// Such as "rms_norm with 5 rows of 64 float32 columns"; "another call" where it is not known.
inline std::string call_words(const CallTag& tag) {
  if (tag.words[0] == kEmpty) return "another call";
  const Call call = call_of(tag);
  std::ostringstream text;
  text << op_name(call.op) << " with " << (call.op == Op::kAllReduce ? call.count & ~kElsewhere : call.count);
  if (call.op == Op::kAllReduce)
    text << " " << traits_of(call.dtype).name << " elements"
         << (call.count & kElsewhere ? " through torch.distributed" : "");
  else
    text << " rows of " << call.widths[0] << (call.op == Op::kQkNorm ? " + " + std::to_string(call.widths[1]) : "")
         << " " << traits_of(call.dtype).name << " columns";
  return text.str();
}

inline uint32_t poison_of(const FaultRecord& record) {
  return poison_word(static_cast<Fault>(record.fault), static_cast<int>(record.rank),
                     static_cast<int>(record.found_by));
}

// What follows "abiding::<op>: ". `record` is null for a rank that another rank has poisoned and that has not called
// since. `calls` are those of the culprit and of the rank that found it.
inline std::string describe(uint32_t poison, const CallTag (&calls)[2], const FaultRecord* record) {
  std::ostringstream text;
  text << "this communicator has stopped: rank " << culprit_of(poison);
  if (fault_of(poison) == static_cast<uint32_t>(Fault::kMismatch))
    text << " called " << call_words(calls[0]) << ", and rank " << finder_of(poison) << " " << call_words(calls[1])
         << "; expected the same call on every rank";
  else
    text << fault_words(fault_of(poison));
  text << " (found by rank " << finder_of(poison);
  if (record)
    text << " in " << op_name(record->op) << ", epoch " << record->epoch << ", after "
         << static_cast<double>(record->waited_ns) * 1e-9 << " s";
  const auto fault = static_cast<Fault>(fault_of(poison));
  const bool left = fault == Fault::kGone || fault == Fault::kClosed;
  text << "); " << (left ? "close it, and make one of the ranks that are left" : "reset() it on every rank");
  return text.str();
}

// Raises if the communicator has stopped. A call that is queued on a device may still find a fault later.
inline void check_running(const char* op, const Communicator& communicator) {
  if (!has_stopped(communicator)) return;
  const FaultRecord& record = *communicator.record;
  fail(op, describe(poison_of(record), record.calls, &record));
}

// One call of a collective: holds the communicator, checks it and `tensor`, and runs body(communicator). A CPU call
// raises its own faults; those of a kernel are raised by the next call, or by check().
template <class Body>
void with_communicator(const char* op, const char* argument, Handle handle, const char* name, const Tensor& tensor,
                       const Body& body) {
  const CommunicatorRef communicator(op, argument, handle);
  check(communicator->memory->is_cuda == tensor.is_cuda(), op, argument, " was made for ",
        communicator->memory->is_cuda ? "CUDA" : "host", " memory, and ", name,
        " is on another kind of device; expected ", name, " there, or a communicator for its device");
  check_running(op, *communicator);
  body(*communicator);
  if (!communicator->memory->is_cuda) check_running(op, *communicator);
}

}  // namespace abiding::peer
