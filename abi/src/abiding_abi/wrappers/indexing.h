// t.index({..}) and t.index_put_({..}, value) with slices, numbers and new dimensions.

// function indexing:
namespace indexing {
inline constexpr std::nullopt_t None = std::nullopt;
struct EllipsisIndexType {};
inline constexpr EllipsisIndexType Ellipsis{};
struct Slice {
  std::optional<int64_t> start, stop, step;
  Slice(
      std::optional<int64_t> start = std::nullopt, std::optional<int64_t> stop = std::nullopt,
      std::optional<int64_t> step = std::nullopt)
      : start(start), stop(stop), step(step) {}
};

/// One index of several: a new dimension, all that are left, a number, whether to take all, a slice or a tensor.
struct [[gnu::visibility("hidden")]] TensorIndex {
  enum class Kind { None, Ellipsis, Integer, Boolean, Slice, Tensor } kind;
  int64_t integer = 0;
  indexing::Slice slice;
  std::optional<abi_ops::Tensor> tensor;
  TensorIndex(std::nullopt_t) : kind(Kind::None) {}
  TensorIndex(EllipsisIndexType) : kind(Kind::Ellipsis) {}
  TensorIndex(const char*) : kind(Kind::Ellipsis) {}  // "..."
  TensorIndex(indexing::Slice slice) : kind(Kind::Slice), slice(slice) {}
  TensorIndex(abi_ops::Tensor tensor) : kind(Kind::Tensor), tensor(tensor) {}
  template <class T, std::enable_if_t<std::is_integral_v<T>, int> = 0>
  TensorIndex(T value) : kind(std::is_same_v<T, bool> ? Kind::Boolean : Kind::Integer), integer(value) {}
};
} // namespace indexing

// function get_item: indexing, slice, index
namespace detail {
struct [[gnu::visibility("hidden")]] Sliced {
  Tensor view;
  std::vector<std::optional<Tensor>> tensors;
};
inline bool is_mask(const Tensor& t) {
  return t.scalar_type() == ScalarType::Bool || t.scalar_type() == ScalarType::Byte;
}
inline int64_t whole_number(const Tensor& t) {
  int64_t value = 0;
  ABI_OPS_CHECK(aoti_torch_item_int64(torch::stable::to(t, ScalarType::Long).get(), &value));
  return value;
}
/// The view that everything but tensors selects, and the tensors at their dimensions of it.
inline Sliced apply_slices(const Tensor& self, const std::vector<indexing::TensorIndex>& indices) {
  using Kind = indexing::TensorIndex::Kind;
  int64_t named = 0;
  for (const auto& i : indices)
    named += i.kind == Kind::Tensor ? (is_mask(*i.tensor) ? i.tensor->dim() : 1)
                                    : i.kind == Kind::Integer || i.kind == Kind::Slice;
  STD_TORCH_CHECK(named <= self.dim(), "too many indices for tensor of dimension ", self.dim());
  Sliced made{self, {}};
  int64_t d = 0;
  const auto take = [&made, &d](bool all) {
    made.view = torch::stable::unsqueeze(made.view, d);
    made.tensors.resize(d + 1);
    made.tensors[d] = torch::stable::full({all ? 1 : 0}, 0, ScalarType::Long, std::nullopt, made.view.device());
    ++d;
  };
  for (const auto& i : indices) {
    if (i.kind == Kind::Integer) {
      made.view = torch::stable::select(made.view, d, i.integer);
    } else if (i.kind == Kind::Slice) {
      made.view = abi_ops::slice(made.view, d++, i.slice.start, i.slice.stop, i.slice.step.value_or(1));
    } else if (i.kind == Kind::Ellipsis) {
      d += self.dim() - named;
    } else if (i.kind == Kind::None) {
      made.view = torch::stable::unsqueeze(made.view, d++);
    } else if (i.kind == Kind::Boolean) {
      take(i.integer != 0);
    } else if (i.tensor->dim() == 0 && is_mask(*i.tensor)) {
      take(whole_number(*i.tensor) != 0);
    } else if (i.tensor->dim() == 0) {
      made.view = torch::stable::select(made.view, d, whole_number(*i.tensor));
    } else {
      made.tensors.resize(d + 1);
      made.tensors[d++] = i.tensor;
    }
  }
  return made;
}
} // namespace detail
/// self[indices], as t.index({..}) gives it
inline Tensor get_item(const Tensor& self, const std::vector<indexing::TensorIndex>& indices) {
  detail::Sliced made = detail::apply_slices(self, indices);
  return made.tensors.empty() ? made.view : abi_ops::index(made.view, made.tensors);
}

// function set_item: get_item, index_put_, Scalar
/// self[indices] = value, as t.index_put_({..}, value) does it
inline Tensor set_item(
    const Tensor& self, const std::vector<indexing::TensorIndex>& indices, const Tensor& value) {
  detail::Sliced made = detail::apply_slices(self, indices);
  std::vector<int64_t> sizes(value.sizes().begin(), value.sizes().end());
  while (!sizes.empty() && sizes.front() == 1) sizes.erase(sizes.begin());  // leading ones are of no account
  const Tensor given = torch::stable::reshape(value, sizes);
  if (made.tensors.empty()) {
    torch::stable::copy_(made.view, given);
  } else {
    abi_ops::index_put_(made.view, made.tensors, torch::stable::to(given, made.view.device()));
  }
  return self;
}
inline Tensor set_item(const Tensor& self, const std::vector<indexing::TensorIndex>& indices, Scalar value) {
  const double number = value.kind == Scalar::Kind::Float ? value.real : static_cast<double>(value.integer);
  return abi_ops::set_item(
      self, indices, torch::stable::full({}, number, self.scalar_type(), std::nullopt, self.device()));
}
