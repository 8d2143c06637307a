#include "common/cuda.h"

#include "all_reduce/kernels.h"
#include "all_reduce/operators.h"

namespace abiding::all_reduce {
namespace {

struct Backend : CudaScope {
  static constexpr bool kBlocking = false;  // a fault of this call shows at the next one, or when asked for
  using CudaScope::CudaScope;
  static const peer::Memory* memory() { return peer::cuda_memory(); }

  static int64_t capacity(const Communicator& communicator, Algorithm algorithm) {
    return all_reduce::capacity(algorithm, communicator.ranks, communicator.max_blocks);
  }
  void all_reduce(const Communicator& communicator, const AllReduceParams& p, Algorithm algorithm) const {
    raise_on_error(all_reduce::all_reduce(communicator.peers(), p, algorithm, stream()));
  }
};

}  // namespace

ABIDING_KERNELS(abiding_custom_ar, CUDA, all_reduce, m) { Operators<Backend>::implement_raw(m); }
ABIDING_KERNELS(abiding, CUDA, all_reduce, m) { Operators<Backend>::implement(m); }

}  // namespace abiding::all_reduce
