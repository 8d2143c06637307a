#include "common/cuda.h"

#include "all_reduce/kernels.h"
#include "all_reduce/operators.h"

namespace abiding::all_reduce {

ABIDING_KERNELS(abiding_custom_ar, CUDA, all_reduce, m) { Operators<CudaScope>::implement_raw(m); }
ABIDING_KERNELS(abiding, CUDA, all_reduce, m) { Operators<CudaScope>::implement(m); }

}  // namespace abiding::all_reduce
