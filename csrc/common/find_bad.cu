#include <cuda_runtime.h>

#include <climits>

#include "common/indices.h"

namespace abiding {
namespace {

// One CTA, because a debug run can wait. Each thread finds its first bad index, and the smallest of those wins.
__global__ void find_bad_kernel(IndexRule rule, int64_t* result) {
  __shared__ unsigned long long first;
  if (threadIdx.x == 0) first = ULLONG_MAX;
  __syncthreads();
  for (int64_t i = threadIdx.x; i < rule.indices.size; i += blockDim.x) {
    if (rule.accepts(i)) continue;
    atomicMin(&first, static_cast<unsigned long long>(i));
    break;
  }
  __syncthreads();
  if (threadIdx.x != 0) return;
  result[0] = static_cast<int64_t>(first);  // ULLONG_MAX reads as -1
  result[1] = first == ULLONG_MAX ? 0 : rule.indices[static_cast<int64_t>(first)];
}

}  // namespace

cudaError_t find_bad(const IndexRule& rule, int64_t* result, cudaStream_t stream) {
  find_bad_kernel<<<1, 1024, 0, stream>>>(rule, result);
  return cudaGetLastError();
}

}  // namespace abiding
