#include "common/cuda.h"

#include "reduce_rms/kernels.h"
#include "reduce_rms/operators.h"

namespace abiding::reduce_rms {
namespace {

struct Backend : CudaScope {
  static constexpr bool kBlocking = false;  // a fault of this call shows at the next one, or when asked for
  using CudaScope::CudaScope;
  static const peer::Memory* memory() { return peer::cuda_memory(); }
  void reduce_rms(const Communicator& communicator, const ReduceRmsParams& p) const {
    raise_on_error(reduce_rms::reduce_rms(communicator.peers(), p, stream()));
  }
  void reduce_rms(const TableParams& table, const ReduceRmsParams& p) const {
    raise_on_error(reduce_rms::reduce_rms_table(table, p, stream()));
  }
};

}  // namespace

ABIDING_KERNELS(abiding, CUDA, reduce_rms, m) { Operators<Backend>::implement(m); }

}  // namespace abiding::reduce_rms
