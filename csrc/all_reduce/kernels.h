// What the CUDA kernels offer to the host code.
#pragma once

#include <cuda_runtime_api.h>

#include "all_reduce/params.h"

namespace abiding::all_reduce {

// As many kernels as the message takes, each of them one call of the protocol.
cudaError_t run_cuda(const AllReduceParams& p, const peer::Peers& peers, cudaStream_t stream);

}  // namespace abiding::all_reduce
