// The launchers of the CUDA kernels; CudaScope::run() finds them by the type of the parameters.
#pragma once

#include <cuda_runtime_api.h>

#include "mla_prologue/params.h"

namespace abiding::mla_prologue {

cudaError_t run_cuda(const PrologueParams& p, cudaStream_t stream);
cudaError_t run_cuda(const GatherParams& p, cudaStream_t stream);

}  // namespace abiding::mla_prologue
