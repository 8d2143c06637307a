#include "common/cuda.h"

#include "mla_prologue/kernels.h"
#include "mla_prologue/operators.h"

namespace abiding::mla_prologue {

ABIDING_KERNELS(abiding, CUDA, mla_prologue, m) { Operators<CudaScope>::implement(m); }

}  // namespace abiding::mla_prologue
