// What the dispatcher alone cannot do: it takes no Scalar, so these put numbers into tensors without dimensions, of the
// dtype that gives the same result type. A line "// function NAME: A, B" begins a function that uses A and B.

// function Scalar:
/// A number that remembers whether it was written as a bool, an integer or a floating point number.
struct Scalar {
  enum class Kind { Bool, Int, Float } kind;
  int64_t integer;
  double real;
  template <class T, std::enable_if_t<std::is_arithmetic_v<T>, int> = 0>
  constexpr Scalar(T value)
      : kind(std::is_same_v<T, bool> ? Kind::Bool : std::is_integral_v<T> ? Kind::Int : Kind::Float),
        integer(static_cast<int64_t>(value)),
        real(static_cast<double>(value)) {}
  // Half, BFloat16 and their kin.
  template <class T, std::enable_if_t<std::is_class_v<T> && std::is_convertible_v<T, float>, int> = 0>
  constexpr Scalar(const T& value) : Scalar(static_cast<double>(static_cast<float>(value))) {}
};

namespace detail {
inline bool is_integer(ScalarType t) {
  return t == ScalarType::Byte || t == ScalarType::Char || t == ScalarType::Short || t == ScalarType::Int ||
      t == ScalarType::Long || t == ScalarType::UInt16 || t == ScalarType::UInt32 || t == ScalarType::UInt64;
}

/// A tensor without dimensions which, beside `like`, gives the result type that the number itself would give. A
/// floating point number beside integers gives float: torch.set_default_dtype is not asked.
inline Tensor scalar_tensor(const Tensor& like, Scalar value) {
  const ScalarType dtype = like.scalar_type();
  const bool whole = is_integer(dtype) || dtype == ScalarType::Bool;
  AtenTensorHandle handle = nullptr;
  if (value.kind == Scalar::Kind::Float) {
    ABI_OPS_CHECK(aoti_torch_scalar_to_tensor_float64(value.real, &handle));
    Tensor made(handle);
    if (whole) return torch::stable::to(made, ScalarType::Float);
    return like.dim() == 0 ? torch::stable::to(made, dtype) : made;
  }
  ABI_OPS_CHECK(aoti_torch_scalar_to_tensor_int64(value.integer, &handle));
  Tensor made(handle);
  if (value.kind == Scalar::Kind::Bool) return torch::stable::to(made, ScalarType::Bool);
  return is_integer(dtype) && like.dim() == 0 ? torch::stable::to(made, dtype) : made;
}
} // namespace detail

// function store_: can_cast
namespace detail {
/// Write the result of an operation into its first argument, with the checks of aten's in-place operations.
inline Tensor store_(const Tensor& self, const Tensor& result) {
  STD_TORCH_CHECK(
      abi_ops::can_cast(result.scalar_type(), self.scalar_type()),
      "result type ", result.scalar_type(), " can't be cast to the desired output type ", self.scalar_type());
  STD_TORCH_CHECK(result.dim() == self.dim(), "the result has ", result.dim(), " dimensions, self has ", self.dim());
  for (int64_t i = 0; i < self.dim(); ++i)
    STD_TORCH_CHECK(
        result.size(i) == self.size(i), "the result has size ", result.size(i), " in dimension ", i, ", self has ",
        self.size(i));
  Tensor target = self;
  return torch::stable::copy_(target, result);
}
} // namespace detail

// function add: Scalar, result_type, broadcast_tensors, stack, mul, sum
/// self + alpha * other
inline Tensor add(const Tensor& self, const Tensor& other, Scalar alpha = 1) {
  const ScalarType dtype = abi_ops::result_type(self, other);
  if (!detail::is_integer(dtype) && dtype != ScalarType::Bool) {
    // Subtraction refuses bool tensors, addition does not.
    auto number = [dtype](const Tensor& t) {
      return t.scalar_type() == ScalarType::Bool ? torch::stable::to(t, dtype) : t;
    };
    return torch::stable::subtract(number(self), number(other), -alpha.real);
  }
  STD_TORCH_CHECK(alpha.kind != Scalar::Kind::Float, "for integers alpha must not be a floating point number");
  STD_TORCH_CHECK(dtype != ScalarType::Bool || alpha.integer == 1, "for bool tensors alpha must be 1");
  const Tensor scaled = alpha.integer == 1 ? other : abi_ops::mul(other, alpha);
  std::vector<Tensor> both = abi_ops::broadcast_tensors({self, scaled});
  for (Tensor& t : both) t = torch::stable::to(t, dtype);
  return abi_ops::sum(abi_ops::stack(both, 0), {0}, false, dtype);
}
inline Tensor add(const Tensor& self, Scalar other, Scalar alpha = 1) {
  return abi_ops::add(self, detail::scalar_tensor(self, other), alpha);
}
inline Tensor add(Scalar self, const Tensor& other) { return abi_ops::add(detail::scalar_tensor(other, self), other); }

// function add_: add, store_
/// self += alpha * other
inline Tensor add_(const Tensor& self, const Tensor& other, Scalar alpha = 1) {
  return detail::store_(self, abi_ops::add(self, other, alpha));
}
inline Tensor add_(const Tensor& self, Scalar other, Scalar alpha = 1) {
  return detail::store_(self, abi_ops::add(self, other, alpha));
}

// function sub: Scalar, result_type, broadcast_tensors, stack, mul, diff
/// self - alpha * other
inline Tensor sub(const Tensor& self, const Tensor& other, Scalar alpha = 1) {
  const ScalarType dtype = abi_ops::result_type(self, other);
  STD_TORCH_CHECK(
      self.scalar_type() != ScalarType::Bool && other.scalar_type() != ScalarType::Bool,
      "sub does not take bool tensors: use logical_xor or logical_not");
  if (!detail::is_integer(dtype)) return torch::stable::subtract(self, other, alpha.real);
  STD_TORCH_CHECK(alpha.kind != Scalar::Kind::Float, "for integers alpha must not be a floating point number");
  const Tensor scaled = alpha.integer == 1 ? other : abi_ops::mul(other, alpha);
  std::vector<Tensor> both = abi_ops::broadcast_tensors({scaled, self});
  for (Tensor& t : both) t = torch::stable::to(t, dtype);
  return torch::stable::select(abi_ops::diff(abi_ops::stack(both, 0), 1, 0), 0, 0);
}
inline Tensor sub(const Tensor& self, Scalar other, Scalar alpha = 1) {
  return abi_ops::sub(self, detail::scalar_tensor(self, other), alpha);
}
inline Tensor sub(Scalar self, const Tensor& other) { return abi_ops::sub(detail::scalar_tensor(other, self), other); }

// function sub_: sub, store_
/// self -= alpha * other
inline Tensor sub_(const Tensor& self, const Tensor& other, Scalar alpha = 1) {
  return detail::store_(self, abi_ops::sub(self, other, alpha));
}
inline Tensor sub_(const Tensor& self, Scalar other, Scalar alpha = 1) {
  return detail::store_(self, abi_ops::sub(self, other, alpha));
}

// function constant_pad_nd:
/// aten::constant_pad_nd(Tensor self, SymInt[] pad, Scalar value=0) -> Tensor
inline Tensor constant_pad_nd(const Tensor& self, IntArray pad, double value = 0) {
  return torch::stable::pad(self, pad, "constant", value);
}

// function bitwise_and_: bitwise_and, store_
/// self &= other
inline Tensor bitwise_and_(const Tensor& self, const Tensor& other) {
  return detail::store_(self, abi_ops::bitwise_and(self, other));
}
inline Tensor bitwise_and_(const Tensor& self, Scalar other) {
  return detail::store_(self, abi_ops::bitwise_and(self, other));
}

// function bitwise_or_: bitwise_or, store_
/// self |= other
inline Tensor bitwise_or_(const Tensor& self, const Tensor& other) {
  return detail::store_(self, abi_ops::bitwise_or(self, other));
}
inline Tensor bitwise_or_(const Tensor& self, Scalar other) {
  return detail::store_(self, abi_ops::bitwise_or(self, other));
}

// function bitwise_xor_: bitwise_xor, store_
/// self ^= other
inline Tensor bitwise_xor_(const Tensor& self, const Tensor& other) {
  return detail::store_(self, abi_ops::bitwise_xor(self, other));
}
inline Tensor bitwise_xor_(const Tensor& self, Scalar other) {
  return detail::store_(self, abi_ops::bitwise_xor(self, other));
}

// function suggest_memory_format:
/// The memory format that self's strides are in; contiguous where they would allow several.
inline torch::headeronly::MemoryFormat suggest_memory_format(const Tensor& self) {
  const int64_t rank = self.dim();
  const auto channels_last = [&self, rank] {
    int64_t least = 0;
    // From the innermost dimension to the outermost: channels, then width, height (and depth), then batch.
    for (int64_t step = 0; step < rank; ++step) {
      const int64_t d = step == 0 ? 1 : step == rank - 1 ? 0 : rank - step;
      const int64_t size = self.size(d), stride = self.stride(d);
      if (size == 0 || stride < least || (step == 0 && stride == 0)) return false;
      if (d == 0 && least == self.stride(1)) return false;  // N111, or a slice of one channel: ambiguous
      least = size > 1 ? stride * size : stride;
    }
    return true;
  };
  if (rank == 4 && channels_last()) return torch::headeronly::MemoryFormat::ChannelsLast;
  if (rank == 5 && channels_last()) return torch::headeronly::MemoryFormat::ChannelsLast3d;
  return torch::headeronly::MemoryFormat::Contiguous;
}

// function canUse32BitIndexMath:
/// Whether every element's offset is below a bound, so that 32-bit indices reach it.
inline bool canUse32BitIndexMath(const Tensor& self, int64_t bound = 2147483647) {
  const int64_t count = self.numel();
  if (count == 0) return bound > 0;
  int64_t offset = 0;
  for (int64_t d = 0; d < self.dim(); ++d) offset += (self.size(d) - 1) * self.stride(d);
  return count < bound && offset < bound;
}

// function fill_: Scalar
/// Every element becomes the value of a tensor without dimensions.
inline Tensor fill_(const Tensor& self, const Tensor& value) {
  std::array<StableIValue, 2> stack{detail::from(self), detail::from(value)};
  ABI_OPS_CHECK(torch_call_dispatcher("aten::fill_", "Tensor", stack.data(), TORCH_ABI_VERSION));
  return detail::to<Tensor>(stack[0]);
}
/// Every element becomes the number: also an int64 beyond 2^53, of which torch::stable::fill_, by a double, loses bits.
inline Tensor fill_(const Tensor& self, Scalar value) {
  constexpr int64_t exact = int64_t{1} << 53;
  if (value.kind == Scalar::Kind::Float || (-exact <= value.integer && value.integer <= exact)) {
    Tensor filled = self;
    return torch::stable::fill_(filled, value.real);
  }
  AtenTensorHandle number = nullptr;
  ABI_OPS_CHECK(aoti_torch_scalar_to_tensor_int64(value.integer, &number));
  return abi_ops::fill_(self, Tensor(number));
}

// function opmath_type:
namespace detail {
template <class T> struct Opmath { using type = T; };
template <> struct Opmath<torch::headeronly::Half> { using type = float; };
template <> struct Opmath<torch::headeronly::BFloat16> { using type = float; };
template <> struct Opmath<torch::headeronly::Float8_e4m3fn> { using type = float; };
template <> struct Opmath<torch::headeronly::Float8_e5m2> { using type = float; };
} // namespace detail
/// The type in which one operation on T is computed.
template <class T> using opmath_type = typename detail::Opmath<T>::type;

// function acc_type: opmath_type
namespace detail {
template <class T, bool OnCuda> struct Accumulate {
  using wide = std::conditional_t<std::is_same_v<opmath_type<T>, float>, std::conditional_t<OnCuda, float, double>, T>;
  using type = std::conditional_t<
      std::is_same_v<T, torch::headeronly::Half> || std::is_same_v<T, torch::headeronly::BFloat16>, float,
      std::conditional_t<std::is_integral_v<T> && !std::is_same_v<T, bool>, int64_t, wide>>;
};
} // namespace detail
/// The type in which many T are summed: on the CPU, double for float.
template <class T, bool OnCuda> using acc_type = typename detail::Accumulate<T, OnCuda>::type;

// function operators: add, sub, mul, div, neg, add_, sub_, mul_, div_, eq, ne, lt, le, gt, ge, bitwise_and,
//   bitwise_or, bitwise_xor, bitwise_not, bitwise_and_, bitwise_or_, bitwise_xor_
// In torch::stable, so that argument-dependent lookup finds them wherever a tensor is. A torch that declares its own
// makes these ambiguous, at compile time: then leave them out.
namespace torch::stable {
#define ABI_OPS_OPERATOR(sign, function)                                                                        \
  inline Tensor operator sign(const Tensor& a, const Tensor& b) { return abi_ops::function(a, b); }             \
  inline Tensor operator sign(const Tensor& a, abi_ops::Scalar b) { return abi_ops::function(a, b); }
ABI_OPS_OPERATOR(+, add)
ABI_OPS_OPERATOR(-, sub)
ABI_OPS_OPERATOR(*, mul)
ABI_OPS_OPERATOR(/, div)
ABI_OPS_OPERATOR(&, bitwise_and)
ABI_OPS_OPERATOR(|, bitwise_or)
ABI_OPS_OPERATOR(^, bitwise_xor)
ABI_OPS_OPERATOR(==, eq)
ABI_OPS_OPERATOR(!=, ne)
ABI_OPS_OPERATOR(<, lt)
ABI_OPS_OPERATOR(<=, le)
ABI_OPS_OPERATOR(>, gt)
ABI_OPS_OPERATOR(>=, ge)
#undef ABI_OPS_OPERATOR
inline Tensor operator+(abi_ops::Scalar a, const Tensor& b) { return abi_ops::add(a, b); }
inline Tensor operator-(abi_ops::Scalar a, const Tensor& b) { return abi_ops::sub(a, b); }
inline Tensor operator*(abi_ops::Scalar a, const Tensor& b) { return abi_ops::mul(a, b); }
inline Tensor operator/(abi_ops::Scalar a, const Tensor& b) { return abi_ops::div(a, b); }
inline Tensor operator-(const Tensor& a) { return abi_ops::neg(a); }
inline Tensor operator~(const Tensor& a) { return abi_ops::bitwise_not(a); }

#define ABI_OPS_ASSIGNMENT(sign, function)                                                                      \
  template <class T> const Tensor& operator sign(const Tensor& a, const T& b) {                                 \
    abi_ops::function(a, b);                                                                                    \
    return a;                                                                                                   \
  }
ABI_OPS_ASSIGNMENT(+=, add_)
ABI_OPS_ASSIGNMENT(-=, sub_)
ABI_OPS_ASSIGNMENT(*=, mul_)
ABI_OPS_ASSIGNMENT(/=, div_)
ABI_OPS_ASSIGNMENT(&=, bitwise_and_)
ABI_OPS_ASSIGNMENT(|=, bitwise_or_)
ABI_OPS_ASSIGNMENT(^=, bitwise_xor_)
#undef ABI_OPS_ASSIGNMENT
} // namespace torch::stable
