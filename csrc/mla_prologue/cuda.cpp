#include "common/cuda.h"

#include "mla_prologue/kernels.h"
#include "mla_prologue/operators.h"

namespace abiding::mla_prologue {
namespace {

struct Backend : CudaScope {
  using CudaScope::CudaScope;
  void prologue(const PrologueParams& p) const { raise_on_error(mla_prologue::prologue(p, stream())); }
  void gather(const GatherParams& p) const { raise_on_error(mla_prologue::gather(p, stream())); }
};

}  // namespace

ABIDING_KERNELS(abiding, CUDA, mla_prologue, m) { Operators<Backend>::implement(m); }

}  // namespace abiding::mla_prologue
