#include "common/cuda.h"

#include "reduce_rms/kernels.h"
#include "reduce_rms/operators.h"

namespace abiding::reduce_rms {

ABIDING_KERNELS(abiding, CUDA, reduce_rms, m) { Operators<CudaScope>::implement(m); }

}  // namespace abiding::reduce_rms
