// What the CUDA kernels offer to the host code: run_cuda() of each struct of params.h, which CudaScope::run() calls.
#pragma once

#include <cuda_runtime_api.h>

#include "mxfp8_moe/params.h"

namespace abiding::mxfp8_moe {

cudaError_t run_cuda(const QuantizeParams& p, cudaStream_t stream);
cudaError_t run_cuda(const RebaseParams& p, cudaStream_t stream);
cudaError_t run_cuda(const RoundParams& p, cudaStream_t stream);
cudaError_t run_cuda(const RowScalesParams& p, cudaStream_t stream);
cudaError_t run_cuda(const DequantizeParams& p, cudaStream_t stream);
cudaError_t run_cuda(const RouteParams& p, cudaStream_t stream);
cudaError_t run_cuda(const GatherParams& p, cudaStream_t stream);
cudaError_t run_cuda(const ActivateParams& p, cudaStream_t stream);
cudaError_t run_cuda(const CombineParams& p, cudaStream_t stream);

// As that of IndexRule (common/cuda.h).
cudaError_t find_first_bad(const RowCodesRule& rule, int64_t* result, cudaStream_t stream);

// An implementation of the grouped GEMM: what a file grouped_mm_sm<NN>.cu, or grouped_mm_portable.cu, defines. cuda.cpp
// has the table.
struct GroupedMmImpl {
  const char* name;
  int arch;              // the compute capability that it is for, 10 * major + minor, compared exactly; 0: any
  RowFormat row_format;  // what it reads best; every one also reads kBf16, but one of kE4m3 reads that alone
  bool (*supports)(const GroupedMmParams& p);
  cudaError_t (*run)(const GroupedMmParams& p, cudaStream_t stream);
};
extern const GroupedMmImpl kGroupedMmSm90, kGroupedMmSm90Fp8, kGroupedMmPortable;

}  // namespace abiding::mxfp8_moe
