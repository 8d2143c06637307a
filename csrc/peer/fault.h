// What the host says of a communicator that has stopped.
#pragma once

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

inline Fault fault_of(const Communicator& communicator) {
  const uint32_t fault = *static_cast<const volatile uint32_t*>(&communicator.record->fault);
  return fault == ~0u ? Fault::kNone : static_cast<Fault>(fault);  // ~0: the record is being written
}

// Raises if the communicator has stopped. A call that has already been queued on a device may still find out later.
inline void check_running(const char* op, const Communicator& communicator) {
  const Fault fault = fault_of(communicator);
  if (fault == Fault::kNone) return;
  const FaultRecord& record = *communicator.record;
  const char* reason = fault == Fault::kTimeout      ? " did not send in time"
                       : fault == Fault::kConcurrent ? " made two calls at once"
                                                     : " is gone";
  fail(op, "this communicator has stopped: rank ", record.rank, reason, ", found by rank ", record.found_by, " in ",
       op_name(record.op), " (epoch ", record.epoch, ", after ", static_cast<double>(record.waited_ns) * 1e-9,
       " s); reset() it on every rank");
}

}  // namespace abiding::peer
