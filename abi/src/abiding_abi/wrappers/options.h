// Options of tensors to make, and the functions that take them.

// function TensorOptions: Scalar
/// What torch::TensorOptions said of a tensor to make. What is not said is torch's default: its default dtype, the CPU.
class [[gnu::visibility("hidden")]] TensorOptions {
 public:
  TensorOptions() = default;
  TensorOptions(ScalarType dtype) : dtype_(dtype) {}
  TensorOptions(Device device) : device_(device) {}
  TensorOptions(torch::headeronly::DeviceType type) : device_(Device(type)) {}
  TensorOptions(torch::headeronly::Layout layout) : layout_(layout) {}

  TensorOptions dtype(std::optional<ScalarType> dtype) const { return with(&TensorOptions::dtype_, dtype); }
  template <class T> TensorOptions dtype() const { return dtype(torch::headeronly::CppTypeToScalarType<T>::value); }
  TensorOptions device(std::optional<Device> device) const { return with(&TensorOptions::device_, device); }
  TensorOptions device(torch::headeronly::DeviceType type, int32_t index = -1) const {
    return device(Device(type, static_cast<torch::stable::DeviceIndex>(index)));
  }
  TensorOptions layout(std::optional<torch::headeronly::Layout> layout) const {
    return with(&TensorOptions::layout_, layout);
  }
  TensorOptions pinned_memory(std::optional<bool> pinned) const { return with(&TensorOptions::pinned_, pinned); }
  /// An operator's results have their requires_grad from autograd: true, which it cannot keep, is an error.
  TensorOptions requires_grad(std::optional<bool> required = true) const {
    STD_TORCH_CHECK(!required.value_or(false), "a stable operator cannot make a tensor that requires grad");
    return *this;
  }

  const std::optional<ScalarType>& dtype_opt() const { return dtype_; }
  const std::optional<Device>& device_opt() const { return device_; }
  const std::optional<torch::headeronly::Layout>& layout_opt() const { return layout_; }
  const std::optional<bool>& pinned_memory_opt() const { return pinned_; }
  Device device() const { return device_.value_or(Device(torch::headeronly::DeviceType::CPU)); }
  torch::stable::DeviceIndex device_index() const { return device().index(); }

 private:
  template <class T> TensorOptions with(T TensorOptions::*member, const T& value) const {
    TensorOptions changed = *this;
    changed.*member = value;
    return changed;
  }
  std::optional<ScalarType> dtype_;
  std::optional<Device> device_;
  std::optional<torch::headeronly::Layout> layout_;
  std::optional<bool> pinned_;
};

namespace detail {
template <bool kFormat, class... First>
inline Tensor made(
    const char* op, const char* overload, const TensorOptions& options,
    std::optional<torch::headeronly::MemoryFormat> format, const First&... first) {
  std::array<StableIValue, sizeof...(First) + 4 + kFormat> stack{
      from(first)..., from(options.dtype_opt()), from(options.layout_opt()), from(options.device_opt()),
      from(options.pinned_memory_opt())};
  if constexpr (kFormat) stack.back() = from(format);
  ABI_OPS_CHECK(torch_call_dispatcher(op, overload, stack.data(), TORCH_ABI_VERSION));
  return to<Tensor>(stack[0]);
}
} // namespace detail

// function options: TensorOptions
/// dtype, device and layout of a tensor
inline TensorOptions options(const Tensor& self) { return TensorOptions(self.scalar_type()).device(self.device()); }

// function dtype: TensorOptions
inline TensorOptions dtype(ScalarType dtype) { return TensorOptions(dtype); }
template <class T> inline TensorOptions dtype() { return TensorOptions().dtype<T>(); }

// function device: TensorOptions
inline TensorOptions device(Device device) { return TensorOptions(device); }
inline TensorOptions device(torch::headeronly::DeviceType type, int32_t index = -1) {
  return TensorOptions().device(type, index);
}

// function empty: TensorOptions
/// aten::empty.memory_format
inline Tensor empty(
    IntArray size, const TensorOptions& options = {},
    std::optional<torch::headeronly::MemoryFormat> format = std::nullopt) {
  return detail::made<true>("aten::empty", "memory_format", options, format, size);
}

// function empty_strided: TensorOptions
/// aten::empty_strided
inline Tensor empty_strided(IntArray size, IntArray stride, const TensorOptions& options = {}) {
  return detail::made<false>("aten::empty_strided", "", options, std::nullopt, size, stride);
}

// function zeros: TensorOptions
/// aten::zeros
inline Tensor zeros(IntArray size, const TensorOptions& options = {}) {
  return detail::made<false>("aten::zeros", "", options, std::nullopt, size);
}

// function ones: TensorOptions
/// aten::ones
inline Tensor ones(IntArray size, const TensorOptions& options = {}) {
  return detail::made<false>("aten::ones", "", options, std::nullopt, size);
}

// function full: empty, fill_
/// A tensor full of a number, whose kind says the dtype where the options do not.
inline Tensor full(IntArray size, Scalar value, TensorOptions options = {}) {
  if (!options.dtype_opt() && value.kind != Scalar::Kind::Float)
    options = options.dtype(value.kind == Scalar::Kind::Bool ? ScalarType::Bool : ScalarType::Long);
  return abi_ops::fill_(abi_ops::empty(size, options), value);
}

// function rand: TensorOptions
/// aten::rand
inline Tensor rand(IntArray size, const TensorOptions& options = {}) {
  return detail::made<false>("aten::rand", "", options, std::nullopt, size);
}

// function randn: TensorOptions
/// aten::randn
inline Tensor randn(IntArray size, const TensorOptions& options = {}) {
  return detail::made<false>("aten::randn", "", options, std::nullopt, size);
}

// function randint: TensorOptions
/// aten::randint and aten::randint.low
inline Tensor randint(int64_t high, IntArray size, const TensorOptions& options = ScalarType::Long) {
  return detail::made<false>("aten::randint", "", options, std::nullopt, high, size);
}
inline Tensor randint(int64_t low, int64_t high, IntArray size, const TensorOptions& options = ScalarType::Long) {
  return detail::made<false>("aten::randint", "low", options, std::nullopt, low, high, size);
}

// function randperm: TensorOptions
/// aten::randperm
inline Tensor randperm(int64_t n, const TensorOptions& options = ScalarType::Long) {
  return detail::made<false>("aten::randperm", "", options, std::nullopt, n);
}

// function eye: TensorOptions
/// aten::eye and aten::eye.m
inline Tensor eye(int64_t n, const TensorOptions& options = {}) {
  return detail::made<false>("aten::eye", "", options, std::nullopt, n);
}
inline Tensor eye(int64_t n, int64_t m, const TensorOptions& options = {}) {
  return detail::made<false>("aten::eye", "m", options, std::nullopt, n, m);
}

// function arange: TensorOptions, cumsum
namespace detail {
/// A whole number: floating point steps would be rounded otherwise than torch rounds them, so they do not compile.
struct Whole {
  int64_t value;
  template <class T, std::enable_if_t<std::is_integral_v<T>, int> = 0>
  constexpr Whole(T number) : value(static_cast<int64_t>(number)) {}
};
} // namespace detail
/// start, start + step, ... below end; int64 where the options name no dtype
inline Tensor arange(detail::Whole start, detail::Whole end, detail::Whole step, const TensorOptions& options = {}) {
  STD_TORCH_CHECK(step.value != 0, "arange: step must be nonzero");
  const int64_t range = end.value - start.value;
  STD_TORCH_CHECK(
      range == 0 || (range > 0) == (step.value > 0), "arange: no steps of ", step.value, " lead from ", start.value,
      " to ", end.value);
  const int64_t count = range / step.value + (range % step.value != 0);
  Tensor steps = torch::stable::full(
      {count}, static_cast<double>(step.value), ScalarType::Long, std::nullopt, options.device());
  if (count > 0) {
    Tensor first = torch::stable::narrow(steps, 0, 0, 1);
    torch::stable::fill_(first, static_cast<double>(start.value));
  }
  return torch::stable::to(abi_ops::cumsum(steps, 0, ScalarType::Long), options.dtype_opt().value_or(ScalarType::Long));
}
inline Tensor arange(detail::Whole start, detail::Whole end, const TensorOptions& options = {}) {
  return abi_ops::arange(start, end, 1, options);
}
inline Tensor arange(detail::Whole end, const TensorOptions& options = {}) {
  return abi_ops::arange(0, end, 1, options);
}

// function empty_like: TensorOptions
/// aten::empty_like
inline Tensor empty_like(
    const Tensor& self, const TensorOptions& options = {},
    std::optional<torch::headeronly::MemoryFormat> format = std::nullopt) {
  return detail::made<true>("aten::empty_like", "", options, format, self);
}

// function zeros_like: TensorOptions
/// aten::zeros_like
inline Tensor zeros_like(
    const Tensor& self, const TensorOptions& options = {},
    std::optional<torch::headeronly::MemoryFormat> format = std::nullopt) {
  return detail::made<true>("aten::zeros_like", "", options, format, self);
}

// function ones_like: TensorOptions
/// aten::ones_like
inline Tensor ones_like(
    const Tensor& self, const TensorOptions& options = {},
    std::optional<torch::headeronly::MemoryFormat> format = std::nullopt) {
  return detail::made<true>("aten::ones_like", "", options, format, self);
}

// function rand_like: TensorOptions
/// aten::rand_like
inline Tensor rand_like(
    const Tensor& self, const TensorOptions& options = {},
    std::optional<torch::headeronly::MemoryFormat> format = std::nullopt) {
  return detail::made<true>("aten::rand_like", "", options, format, self);
}

// function randn_like: TensorOptions
/// aten::randn_like
inline Tensor randn_like(
    const Tensor& self, const TensorOptions& options = {},
    std::optional<torch::headeronly::MemoryFormat> format = std::nullopt) {
  return detail::made<true>("aten::randn_like", "", options, format, self);
}

// function full_like: empty_like, fill_
/// The number, with the strides that empty_like gives.
inline Tensor full_like(
    const Tensor& self, Scalar value, const TensorOptions& options = {},
    std::optional<torch::headeronly::MemoryFormat> format = std::nullopt) {
  return abi_ops::fill_(abi_ops::empty_like(self, options, format), value);
}

// function new_empty: TensorOptions
/// aten::new_empty
inline Tensor new_empty(const Tensor& self, IntArray size, const TensorOptions& options = {}) {
  return detail::made<false>("aten::new_empty", "", options, std::nullopt, self, size);
}

// function new_zeros: TensorOptions
/// aten::new_zeros
inline Tensor new_zeros(const Tensor& self, IntArray size, const TensorOptions& options = {}) {
  return detail::made<false>("aten::new_zeros", "", options, std::nullopt, self, size);
}

// function new_ones: TensorOptions
/// aten::new_ones
inline Tensor new_ones(const Tensor& self, IntArray size, const TensorOptions& options = {}) {
  return detail::made<false>("aten::new_ones", "", options, std::nullopt, self, size);
}

// function new_full: new_empty, fill_
/// A tensor of this size full of a number, with self's dtype and device where the options name none.
inline Tensor new_full(const Tensor& self, IntArray size, Scalar value, const TensorOptions& options = {}) {
  return abi_ops::fill_(abi_ops::new_empty(self, size, options), value);
}

// function to: TensorOptions
/// aten::to.dtype_layout
inline Tensor to(
    const Tensor& self, const TensorOptions& options, bool non_blocking = false, bool copy = false,
    std::optional<torch::headeronly::MemoryFormat> format = std::nullopt) {
  return torch::stable::to(
      self, options.dtype_opt(), options.layout_opt(), options.device_opt(), options.pinned_memory_opt(), non_blocking,
      copy, format);
}

// function from_blob: TensorOptions, empty
/// A tensor over memory that it does not own; contiguous where no strides are given.
inline Tensor from_blob(void* data, IntArray sizes, IntArray strides, const TensorOptions& options = {}) {
  const ScalarType dtype = options.dtype_opt() ? *options.dtype_opt() : abi_ops::empty({0}).scalar_type();
  return torch::stable::from_blob(data, sizes, strides, options.device(), dtype);
}
inline Tensor from_blob(void* data, IntArray sizes, const TensorOptions& options = {}) {
  std::vector<int64_t> strides(sizes.size(), 1);
  for (size_t d = sizes.size(); d > 1; --d) strides[d - 2] = strides[d - 1] * sizes[d - 1];
  return abi_ops::from_blob(data, sizes, strides, options);
}

// function tensor: from_blob
namespace detail {
template <class T>
inline Tensor of_values(const T* values, size_t count, IntArray sizes, const TensorOptions& options) {
  using Wide =
      std::conditional_t<std::is_same_v<T, bool>, bool, std::conditional_t<std::is_integral_v<T>, int64_t, double>>;
  ScalarType dtype = torch::headeronly::CppTypeToScalarType<T>::value;
  if (dtype == ScalarType::Int) dtype = ScalarType::Long;
  if (std::is_floating_point_v<T>) dtype = abi_ops::empty({0}).scalar_type();
  std::vector<Wide> wide(values, values + count);
  std::array<Wide, 1> one{};  // a list of bool has no memory to point to
  Tensor all;
  if constexpr (std::is_same_v<Wide, bool>) {
    std::vector<uint8_t> bytes(wide.begin(), wide.end());
    all = torch::stable::clone(abi_ops::from_blob(bytes.data(), sizes, ScalarType::Byte));
  } else {
    void* data = count ? wide.data() : one.data();
    all = torch::stable::clone(abi_ops::from_blob(data, sizes, torch::headeronly::CppTypeToScalarType<Wide>::value));
  }
  return torch::stable::to(all, options.dtype_opt().value_or(dtype), std::nullopt, options.device());
}
} // namespace detail
/// A number, or a list of them, as a tensor; int64 for int, the default dtype for float and double.
template <class T, std::enable_if_t<std::is_arithmetic_v<T>, int> = 0>
inline Tensor tensor(T value, const TensorOptions& options = {}) {
  return detail::of_values(&value, 1, {}, options);
}
template <class T> inline Tensor tensor(std::initializer_list<T> values, const TensorOptions& options = {}) {
  return detail::of_values(values.begin(), values.size(), {static_cast<int64_t>(values.size())}, options);
}
template <class T> inline Tensor tensor(const std::vector<T>& values, const TensorOptions& options = {}) {
  static_assert(!std::is_same_v<T, bool>, "a vector of bool has no memory to read: use uint8_t");
  return detail::of_values(values.data(), values.size(), {static_cast<int64_t>(values.size())}, options);
}
template <class T>
inline Tensor tensor(torch::headeronly::HeaderOnlyArrayRef<T> values, const TensorOptions& options = {}) {
  return detail::of_values(values.data(), values.size(), {static_cast<int64_t>(values.size())}, options);
}
