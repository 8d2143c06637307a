// What the CUDA kernels offer to the host code.
#pragma once

#include <cuda_runtime_api.h>

#include "reduce_rms/params.h"

namespace abiding::reduce_rms {

// As many kernels, each a call of the protocol, as the tokens take.
cudaError_t reduce_rms(const peer::Peers& peers, const ReduceRmsParams& p, cudaStream_t stream);

// The same over a table of pointers that the caller allocated, as upstream's operators take it.
cudaError_t reduce_rms_table(const TableParams& table, const ReduceRmsParams& p, cudaStream_t stream);

}  // namespace abiding::reduce_rms
