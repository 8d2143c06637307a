#include "common/cpu.h"

#include "all_reduce/operators.h"
#include "peer/host.h"

namespace abiding::all_reduce {

// The host protocol splits a message of any size into epochs itself, and is always one-shot.
void run_cpu(const AllReduceParams& p, const peer::Peers& peers) {
  peer::all_reduce(peers, peer::kDirect, p.input, p.out, p.numel, p.dtype);
}

ABIDING_KERNELS(abiding_custom_ar, CPU, all_reduce, m) { Operators<CpuScope>::implement_raw(m); }
ABIDING_KERNELS(abiding, CPU, all_reduce, m) { Operators<CpuScope>::implement(m); }

}  // namespace abiding::all_reduce
