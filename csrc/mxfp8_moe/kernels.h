// What the CUDA kernels offer to the host code.
#pragma once

#include <cuda_runtime_api.h>

#include "mxfp8_moe/params.h"

namespace abiding::mxfp8_moe {

cudaError_t quantize(const QuantizeParams& p, cudaStream_t stream);
cudaError_t round(const RoundParams& p, cudaStream_t stream);
cudaError_t dequantize(const DequantizeParams& p, cudaStream_t stream);
cudaError_t grouped_mm(const GroupedMmParams& p, cudaStream_t stream);
cudaError_t takes_interleaved(bool* it_does);  // grouped_mm, on this device
cudaError_t route(const RouteParams& p, cudaStream_t stream);
cudaError_t gather(const GatherParams& p, cudaStream_t stream);
cudaError_t activate(const ActivateParams& p, cudaStream_t stream);
cudaError_t combine(const CombineParams& p, cudaStream_t stream);

// The Hopper kernel that grouped_mm chooses there.
cudaError_t grouped_mm_sm90(const GroupedMmParams& p, cudaStream_t stream);

}  // namespace abiding::mxfp8_moe
