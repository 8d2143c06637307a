// What the CUDA kernels offer to the host code.
#pragma once

#include <cuda_runtime_api.h>

#include "reduce_rms/params.h"

namespace abiding::reduce_rms {

// As many kernels as the tokens take, each of them one call of the protocol.
cudaError_t run_cuda(const ReduceRmsParams& p, const peer::Peers& peers, cudaStream_t stream);

// The same over a table of pointers that the caller allocated, as upstream's operators take it.
cudaError_t run_cuda(const ReduceRmsParams& p, const TableParams& table, cudaStream_t stream);

}  // namespace abiding::reduce_rms
