// What the CUDA kernels offer to the host code.
#pragma once

#include <cuda_runtime_api.h>

#include "all_reduce/params.h"

namespace abiding::all_reduce {

// One call of the protocol: at most capacity(algorithm, ranks, max_blocks) bytes.
cudaError_t all_reduce(const peer::Peers& peers, const AllReduceParams& p, Algorithm algorithm, cudaStream_t stream);

}  // namespace abiding::all_reduce
