// Argument checks. Every error has one grammar:
// `abiding::<op>: <argument> <what was given>; expected <what is accepted>`.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <initializer_list>
#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "common/dtypes.h"
#include "common/indices.h"

namespace abiding {

using torch::stable::Tensor;

template <class... Parts>
[[noreturn]] void fail(const char* op, const Parts&... parts) {
  std::ostringstream text;
  text << "abiding::" << op << ": ";
  (text << ... << parts);
  throw std::runtime_error(text.str());
}

template <class... Parts>
void check(bool ok, const char* op, const Parts&... parts) {
  if (!ok) fail(op, parts...);
}

inline void check_eps(const char* op, double eps) {
  check(std::isfinite(eps) && eps >= 0, op, "eps is ", eps, "; expected a finite number, not negative");
}

// Maps torch's code of a dtype to ours. The aoti_torch_dtype_* functions are the stable names of the codes.
inline DType dtype_from_torch(int32_t code) {
  struct Table {
    DType dtypes[64];
    Table() {
      std::fill(std::begin(dtypes), std::end(dtypes), DType::kOther);
      const auto set = [this](int32_t torch_code, DType dtype) {
        if (0 <= torch_code && torch_code < 64) dtypes[torch_code] = dtype;
      };
      set(aoti_torch_dtype_bfloat16(), DType::kBfloat16);
      set(aoti_torch_dtype_float16(), DType::kFloat16);
      set(aoti_torch_dtype_float32(), DType::kFloat32);
      set(aoti_torch_dtype_float64(), DType::kFloat64);
      set(aoti_torch_dtype_float8_e4m3fn(), DType::kFloat8E4m3);
      set(aoti_torch_dtype_float8_e5m2(), DType::kFloat8E5m2);
      set(aoti_torch_dtype_uint8(), DType::kUint8);
      set(aoti_torch_dtype_int8(), DType::kInt8);
      set(aoti_torch_dtype_int16(), DType::kInt16);
      set(aoti_torch_dtype_int32(), DType::kInt32);
      set(aoti_torch_dtype_int64(), DType::kInt64);
      set(aoti_torch_dtype_bool(), DType::kBool);
    }
  };
  static const Table table;
  return 0 <= code && code < 64 ? table.dtypes[code] : DType::kOther;
}

// The name of torch's code of a dtype, also of those that no kernel takes.
inline const char* dtype_name(int32_t code) {
  const DType known = dtype_from_torch(code);
  if (known != DType::kOther) return traits_of(known).name;
  const std::pair<int32_t, const char*> others[] = {{aoti_torch_dtype_uint16(), "uint16"},
                                                    {aoti_torch_dtype_uint32(), "uint32"},
                                                    {aoti_torch_dtype_uint64(), "uint64"},
                                                    {aoti_torch_dtype_complex32(), "complex32"},
                                                    {aoti_torch_dtype_complex64(), "complex64"},
                                                    {aoti_torch_dtype_complex128(), "complex128"},
                                                    {aoti_torch_dtype_float8_e4m3fnuz(), "float8_e4m3fnuz"},
                                                    {aoti_torch_dtype_float8_e5m2fnuz(), "float8_e5m2fnuz"}};
  for (const auto& [other, name] : others)
    if (other == code) return name;
  return traits_of(known).name;
}

inline std::ostream& write(std::ostream& text, const torch::headeronly::IntHeaderOnlyArrayRef& values) {
  text << "[";
  for (size_t i = 0; i < values.size(); ++i) text << (i ? ", " : "") << values[i];
  return text << "]";
}

// One tensor argument under check. Each test returns the argument, so that a contract reads as one sentence.
class Argument {
 public:
  Argument(const char* op, const char* name, const Tensor& tensor) : op_(op), name_(name), tensor_(tensor) {
    check(tensor.defined(), op, name, " is undefined; expected a tensor");
    aoti_torch_get_dtype(tensor.get(), &code_);
    dtype_ = dtype_from_torch(code_);
    // Freed, as sharded data parallelism does with parameters. Such a tensor keeps its sizes, and a view an address.
    int64_t bytes = 0;
    aoti_torch_get_storage_size(tensor.get(), &bytes);
    check(bytes > 0 || tensor.numel() == 0, op, name, " has shape ", shape(),
          " over storage that was freed; expected a tensor with memory");
  }

  const Argument& dtype(std::initializer_list<DType> accepted) const {
    for (DType candidate : accepted)
      if (candidate == dtype_) return *this;
    std::string names;
    for (DType candidate : accepted) names += (names.empty() ? "" : " or ") + std::string(traits_of(candidate).name);
    fail(op_, name_, " has dtype ", dtype_name(code_), "; expected dtype ", names);
  }
  const Argument& same_dtype(const Argument& other) const {
    if (code_ != other.code_)
      fail(op_, name_, " has dtype ", dtype_name(code_), "; expected dtype ", dtype_name(other.code_), " as ",
           other.name_);
    return *this;
  }
  const Argument& same_device(const Argument& other) const {
    check(tensor_.is_cuda() == other.tensor_.is_cuda() && tensor_.is_cpu() == other.tensor_.is_cpu() &&
              tensor_.get_device_index() == other.tensor_.get_device_index(),
          op_, name_, " is on ", device(), "; expected device ", other.device(), " as ", other.name_);
    return *this;
  }
  const Argument& rank(int64_t expected) const {
    check(tensor_.dim() == expected, op_, name_, " has shape ", shape(), "; expected ", expected, " dimensions");
    return *this;
  }
  template <class... Meaning>
  const Argument& size(int64_t dim, int64_t expected, const Meaning&... meaning) const {
    check(tensor_.size(dim) == expected, op_, name_, " has shape ", shape(), "; expected size ", expected,
          " in dimension ", dim, meaning...);
    return *this;
  }
  const Argument& contiguous() const {
    check(tensor_.is_contiguous(), op_, name_, " has shape ", shape(), " and strides ", strides(),
          "; expected a contiguous tensor, as ", name_, ".contiguous() is");
    return *this;
  }
  // The last dimension has stride 1; every other stride is a multiple of `step` elements.
  const Argument& dense_rows(int64_t step) const {
    const int64_t last = tensor_.dim() - 1;
    check(tensor_.size(last) <= 1 || tensor_.stride(last) == 1, op_, name_, " has strides ", strides(),
          "; expected stride 1 in the last dimension, as ", name_, ".contiguous() has");
    for (int64_t d = 0; d < last; ++d)
      check(tensor_.size(d) <= 1 || tensor_.stride(d) % step == 0, op_, name_, " has strides ", strides(),
            "; expected multiples of ", step, " elements, so that rows stay aligned");
    return *this;
  }
  // No two indices share an element: each outer stride is at least the extent of the dimensions inside it.
  const Argument& no_overlap() const {
    if (tensor_.numel() == 0) return *this;
    int64_t span = 1;
    for (int64_t d = tensor_.dim() - 1; d >= 0; --d) {
      if (tensor_.size(d) <= 1) continue;
      check(tensor_.stride(d) >= span, op_, name_, " has shape ", shape(), " and strides ", strides(),
            "; expected rows in order that do not overlap, since it is written");
      span = tensor_.stride(d) * (tensor_.size(d) - 1) + span;
    }
    return *this;
  }
  // Memory without gaps and overlaps, whatever the order of the strides: an elementwise kernel may take the tensor as
  // numel contiguous elements.
  const Argument& dense() const {
    check(is_dense(), op_, name_, " has shape ", shape(), " and strides ", strides(),
          "; expected memory without gaps or overlaps");
    return *this;
  }
  // Only GPU kernels move whole vectors: on a CPU the data need lie on no more than multiples of its elements. Tensors
  // that are mapped from a file may lie anywhere.
  const Argument& aligned(uintptr_t bytes) const {
    return aligned_on_cpu_too(tensor_.is_cpu() ? static_cast<uintptr_t>(tensor_.element_size()) : bytes);
  }
  const Argument& aligned_on_cpu_too(uintptr_t bytes) const {
    const uintptr_t past = reinterpret_cast<uintptr_t>(tensor_.data_ptr()) % bytes;
    check(past == 0, op_, name_, " starts at an address that is ", past, " bytes past a multiple of ", bytes,
          "; expected data aligned to ", bytes, " bytes, as that of ", name_, ".clone() is");
    return *this;
  }

  const Tensor& tensor() const { return tensor_; }
  const char* op() const { return op_; }
  const char* name() const { return name_; }
  DType dtype() const { return dtype_; }
  // Parts of messages. They are formatted only when an error is raised, so that a valid call does not pay for it.
  struct Shape {
    const Tensor& tensor;
    friend std::ostream& operator<<(std::ostream& text, const Shape& it) { return write(text, it.tensor.sizes()); }
  };
  struct Strides {
    const Tensor& tensor;
    friend std::ostream& operator<<(std::ostream& text, const Strides& it) { return write(text, it.tensor.strides()); }
  };
  struct Device {
    const Tensor& tensor;
    friend std::ostream& operator<<(std::ostream& text, const Device& it) {
      if (it.tensor.is_cpu()) return text << "cpu";
      return text << (it.tensor.is_cuda() ? "cuda:" : "another device:") << int64_t{it.tensor.get_device_index()};
    }
  };
  Shape shape() const { return {tensor_}; }
  Strides strides() const { return {tensor_}; }

 private:
  Device device() const { return {tensor_}; }
  bool is_dense() const {
    if (tensor_.is_contiguous()) return true;
    std::vector<std::pair<int64_t, int64_t>> dims;  // stride, size
    for (int64_t d = 0; d < tensor_.dim(); ++d) {
      if (tensor_.size(d) == 0) return true;
      if (tensor_.size(d) > 1) dims.emplace_back(tensor_.stride(d), tensor_.size(d));
    }
    std::sort(dims.begin(), dims.end());
    int64_t expected = 1;
    for (const auto& [stride, size] : dims) {
      if (stride != expected) return false;
      expected *= size;
    }
    return true;
  }

  const char* op_;
  const char* name_;
  const Tensor& tensor_;
  int32_t code_ = -1;  // torch's
  DType dtype_ = DType::kOther;
};

// The debug check of index values; `scope` is the backend's, which can read them.
template <class Scope>
void check_index_values(const char* op, const Scope& scope, std::initializer_list<IndexRule> rules) {
  if (!index_checks_enabled()) return;
  for (const IndexRule& rule : rules) {
    const BadIndex bad = scope.find_bad(rule);
    check(bad.at < 0, op, rule.argument, "[", bad.at, "] is ", bad.value, "; expected ",
          rule.low == INT64_MIN ? "a negative value (skipped) or less than " : "0 or more and less than ", rule.high);
  }
}

// A new tensor with the dtype and device of an argument, whose sizes decide its own. It calls the C shim, because
// looking up the operator by its name takes as long as the rest of a small call. Torch's error text does not cross the
// C boundary, so ours names the size.
template <class Sizes, class Strides>
Tensor new_empty_strided(const Argument& argument, const Sizes& sizes, const Strides& strides) {
  const Tensor& like = argument.tensor();
  int32_t dtype = 0, device_type = 0, device_index = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(like.get(), &dtype));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &device_index));
  AtenTensorHandle made = nullptr;
  if (aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(), dtype, device_type,
                               device_index, &made) == AOTI_TORCH_SUCCESS)
    return Tensor(made);
  double bytes = static_cast<double>(like.element_size());
  std::string shape;
  for (int64_t size : sizes) {
    bytes *= static_cast<double>(size);
    shape += (shape.empty() ? "" : ", ") + std::to_string(size);
  }
  fail(argument.op(), argument.name(), " has shape ", argument.shape(),
       ", and there is no memory for a tensor of shape [", shape, "]; expected ", bytes / (1 << 30),
       " GiB that are free, or a smaller ", argument.name());
}

inline Tensor new_empty(const Argument& argument, const std::vector<int64_t>& sizes) {
  std::vector<int64_t> strides(sizes.size());
  int64_t stride = 1;
  for (size_t i = sizes.size(); i-- > 0; stride *= sizes[i] > 1 ? sizes[i] : 1) strides[i] = stride;
  return new_empty_strided(argument, sizes, strides);
}

}  // namespace abiding
