#include "common/find_bad.cuh"

namespace abiding {

cudaError_t find_first_bad(const IndexRule& rule, int64_t* result, cudaStream_t stream) {
  return launch_find_bad(rule, result, stream);
}

}  // namespace abiding
