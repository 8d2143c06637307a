// The CUDA backend of an operator call: makes the tensor's device current, finds its stream and raises launch errors.
#pragma once

#include <cuda_runtime_api.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>

#include "common/check.h"
#include "common/device.h"

namespace abiding {

// Writes the first index that breaks the rule to result[0], or -1, and its value to result[1]. Groups have overloads
// for rules of their own, which ADL finds.
cudaError_t find_first_bad(const IndexRule& rule, int64_t* result, cudaStream_t stream);

class CudaScope {
 public:
  explicit CudaScope(const Tensor& tensor) : tensor_(tensor), guard_(tensor.get_device_index()) {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }

  cudaStream_t stream() const { return stream_; }

  // Launches the kernels of a params.h struct: the overload of run_cuda() in its namespace, found by ADL.
  template <class Params, class... Arguments>
  void run(const Params& params, const Arguments&... arguments) const {
    STD_CUDA_CHECK(run_cuda(params, arguments..., stream_));
  }

  // Synchronizes the stream, so it checks nothing while a graph is captured.
  template <class Rule>
  BadIndex find_bad(const Rule& rule) const {
    cudaStreamCaptureStatus capture = cudaStreamCaptureStatusNone;
    STD_CUDA_CHECK(cudaStreamIsCapturing(stream_, &capture));
    if (capture != cudaStreamCaptureStatusNone || rule.size() == 0) return {};
    const Tensor scratch = torch::stable::new_empty(tensor_, {2}, torch::headeronly::ScalarType::Long);
    BadIndex bad;
    STD_CUDA_CHECK(find_first_bad(rule, static_cast<int64_t*>(scratch.mutable_data_ptr()), stream_));
    STD_CUDA_CHECK(cudaMemcpyAsync(&bad, scratch.data_ptr(), sizeof bad, cudaMemcpyDeviceToHost, stream_));
    STD_CUDA_CHECK(cudaStreamSynchronize(stream_));
    return bad;
  }

 private:
  const Tensor& tensor_;
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_ = nullptr;
};

}  // namespace abiding
