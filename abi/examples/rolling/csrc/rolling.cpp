// Sums over a sliding window, written against torch's C++ API as extensions have been for years.
#include <ATen/Parallel.h>
#include <torch/extension.h>

#define CHECK_INPUT(x) TORCH_CHECK((x).device().is_cpu() && (x).is_contiguous(), #x " must be contiguous, on the CPU")

namespace {

template <typename scalar_t>
void sum_rows(const scalar_t* x, scalar_t* out, int64_t rows, int64_t columns, int64_t window) {
  at::parallel_for(0, rows, 1, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      scalar_t sum = 0;
      for (int64_t i = 0; i < columns; ++i) {
        sum += x[row * columns + i];
        if (i >= window) sum -= x[row * columns + i - window];
        out[row * columns + i] = sum;
      }
    }
  });
}

}  // namespace

// Each element with its predecessors, `window` in all; rows have weights if there are any.
at::Tensor rolling_sum(const at::Tensor& x, int window, c10::optional<at::Tensor> weights) {
  CHECK_INPUT(x);
  TORCH_CHECK(x.dim() == 2, "x must have two dimensions, and has ", x.dim());
  TORCH_CHECK_GT(window, 0);
  auto out = torch::zeros_like(x);
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "rolling_sum", [&] {
    sum_rows<scalar_t>(x.data_ptr<scalar_t>(), out.data_ptr<scalar_t>(), x.size(0), x.size(1), window);
  });
  if (weights.has_value()) {
    auto scaled = out * weights.value().view({-1, 1});
    return scaled;
  }
  return out;
}

// The same in place of x, divided by what `divisor` says.
void rolling_mean_(at::Tensor x, int window, float divisor) {
  CHECK_INPUT(x);
  auto sums = rolling_sum(x, window, c10::nullopt);
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "rolling_mean_", [&] {
    auto to = x.accessor<scalar_t, 2>();
    auto from = sums.accessor<scalar_t, 2>();
    for (int64_t i = 0; i < x.size(0); ++i) {
      for (int64_t j = 0; j < x.size(1); ++j) {
        to[i][j] = from[i][j] / static_cast<scalar_t>(divisor);
      }
    }
  });
}

// Where each row's sum of a window is largest.
at::Tensor busiest(const at::Tensor& x, int window) {
  auto sums = rolling_sum(x, window, c10::nullopt);
  auto best = torch::empty({x.size(0)}, x.options().dtype(torch::kLong));
  auto result = best.data_ptr<int64_t>();
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "busiest", [&] {
    const scalar_t* data = sums.data_ptr<scalar_t>();
    for (int64_t row = 0; row < x.size(0); ++row) {
      result[row] = std::max_element(data + row * x.size(1), data + (row + 1) * x.size(1)) - (data + row * x.size(1));
    }
  });
  return best;
}

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.def("rolling_sum", &rolling_sum, "sums over a window", py::arg("x"), py::arg("window"),
        py::arg("weights") = py::none());
  m.def("rolling_mean_", &rolling_mean_, py::arg("x"), py::arg("window"), py::arg("divisor") = 1.0f);
  m.def("busiest", &busiest);
}
