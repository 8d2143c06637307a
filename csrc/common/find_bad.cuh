// The debug check on a GPU: the first element that breaks a rule.
#pragma once

#include <cuda_runtime.h>

#include <climits>

#include "common/indices.h"

namespace abiding {

// One CTA, because a debug run can wait. Each thread finds its first bad element, and the smallest of those wins.
template <class Rule>
__global__ void find_bad_kernel(Rule rule, int64_t* result) {
  __shared__ unsigned long long first;
  if (threadIdx.x == 0) first = ULLONG_MAX;
  __syncthreads();
  for (int64_t i = threadIdx.x; i < rule.size(); i += blockDim.x) {
    if (rule.accepts(i)) continue;
    atomicMin(&first, static_cast<unsigned long long>(i));
    break;
  }
  __syncthreads();
  if (threadIdx.x != 0) return;
  result[0] = static_cast<int64_t>(first);  // ULLONG_MAX reads as -1
  result[1] = first == ULLONG_MAX ? 0 : rule.value(static_cast<int64_t>(first));
}

template <class Rule>
cudaError_t launch_find_bad(const Rule& rule, int64_t* result, cudaStream_t stream) {
  find_bad_kernel<<<1, 1024, 0, stream>>>(rule, result);
  return cudaGetLastError();
}

}  // namespace abiding
