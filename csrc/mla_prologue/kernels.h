// What the CUDA kernels offer to the host code.
#pragma once

#include <cuda_runtime_api.h>

#include "mla_prologue/params.h"

namespace abiding::mla_prologue {

cudaError_t prologue(const PrologueParams& p, cudaStream_t stream);
cudaError_t gather(const GatherParams& p, cudaStream_t stream);

}  // namespace abiding::mla_prologue
