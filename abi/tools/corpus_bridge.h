// Stands in for torch's unstable types while corpus_truth.py looks for members and operators that the stable tensor
// lacks: with these names declared, a compiler goes on to the expressions that use them. Nothing here runs.
#pragma once

#include <functional>
#include <memory>
#include <optional>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/Dispatch_v2.h>
#include <torch/headeronly/core/TensorAccessor.h>

namespace bridge {
using torch::headeronly::DeviceType;
using torch::headeronly::HeaderOnlyArrayRef;
using torch::headeronly::Layout;
using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
using torch::stable::Device;
using torch::stable::Tensor;
using IntArrayRef = torch::headeronly::IntHeaderOnlyArrayRef;
using TensorList = std::vector<Tensor>;
template <class T> using ArrayRef = HeaderOnlyArrayRef<T>;
template <class T, size_t N> using TensorAccessor = torch::headeronly::HeaderOnlyTensorAccessor<T, N>;
template <class T> struct DefaultPtrTraits { using PtrType = T*; };
template <class T> struct RestrictPtrTraits { using PtrType = T* __restrict__; };
template <class T, size_t N, template <class> class P = DefaultPtrTraits, class I = int64_t>
using GenericPackedTensorAccessor = torch::headeronly::HeaderOnlyGenericPackedTensorAccessor<T, N, P, I>;
template <class T, size_t N, template <class> class P = DefaultPtrTraits>
using PackedTensorAccessor32 = GenericPackedTensorAccessor<T, N, P, int32_t>;
template <class T, size_t N, template <class> class P = DefaultPtrTraits>
using PackedTensorAccessor64 = GenericPackedTensorAccessor<T, N, P, int64_t>;
template <class T> using optional = std::optional<T>;
using std::make_optional;
using std::nullopt;
using string_view = std::string_view;

struct TensorOptions {
  TensorOptions() = default;
  TensorOptions(ScalarType) {}
  TensorOptions(Device) {}
  TensorOptions(DeviceType) {}
  TensorOptions(Layout) {}
  template <class... A> TensorOptions dtype(A&&...) const { return {}; }
  template <class... A> TensorOptions device(A&&...) const { return {}; }
  template <class... A> TensorOptions layout(A&&...) const { return {}; }
  template <class... A> TensorOptions requires_grad(A&&...) const { return {}; }
  template <class... A> TensorOptions pinned_memory(A&&...) const { return {}; }
  template <class... A> TensorOptions memory_format(A&&...) const { return {}; }
};
template <class T> TensorOptions dtype(T) { return {}; }
template <class... T> TensorOptions device(T...) { return {}; }

struct Scalar {
  template <class T> Scalar(T) {}
  template <class T> T to() const { return T(); }
};

#define BRIDGE_FACTORY(name)                                                             \
  inline Tensor name(IntArrayRef, TensorOptions = {}, std::optional<MemoryFormat> = {}) { return {}; } \
  inline Tensor name(std::initializer_list<int64_t>, TensorOptions = {}, std::optional<MemoryFormat> = {}) { \
    return {};                                             \
  } \
  inline Tensor name(const std::vector<int64_t>&, TensorOptions = {}, std::optional<MemoryFormat> = {}) { return {}; }
BRIDGE_FACTORY(empty)
BRIDGE_FACTORY(zeros)
BRIDGE_FACTORY(ones)
BRIDGE_FACTORY(rand)
BRIDGE_FACTORY(randn)
inline Tensor empty_like(const Tensor&, TensorOptions = {}) { return {}; }
inline Tensor zeros_like(const Tensor&, TensorOptions = {}) { return {}; }
inline Tensor ones_like(const Tensor&, TensorOptions = {}) { return {}; }
template <class S> Tensor full(IntArrayRef, S, TensorOptions = {}) { return {}; }
template <class S> Tensor full_like(const Tensor&, S, TensorOptions = {}) { return {}; }
inline Tensor cat(TensorList, int64_t = 0) { return {}; }
inline Tensor stack(TensorList, int64_t = 0) { return {}; }

constexpr auto kFloat = ScalarType::Float, kFloat32 = ScalarType::Float, kDouble = ScalarType::Double;
constexpr auto kFloat64 = ScalarType::Double, kHalf = ScalarType::Half, kFloat16 = ScalarType::Half;
constexpr auto kBFloat16 = ScalarType::BFloat16, kInt = ScalarType::Int, kInt32 = ScalarType::Int;
constexpr auto kLong = ScalarType::Long, kInt64 = ScalarType::Long, kShort = ScalarType::Short;
constexpr auto kInt16 = ScalarType::Short, kInt8 = ScalarType::Char, kChar = ScalarType::Char;
constexpr auto kUInt8 = ScalarType::Byte, kByte = ScalarType::Byte, kBool = ScalarType::Bool;
constexpr auto kCPU = DeviceType::CPU, kCUDA = DeviceType::CUDA;
constexpr auto kStrided = Layout::Strided;

struct NoGradGuard {};
} // namespace bridge

namespace at {
using namespace bridge;
using bridge::Tensor;
} // namespace at
namespace c10 {
using namespace bridge;
} // namespace c10
namespace torch {
using namespace bridge;
using Dtype = bridge::ScalarType;
} // namespace torch

#ifdef __CUDACC__
#include <cuda_runtime.h>
#endif
#if __has_include(<cuda_runtime_api.h>)
#include <cuda_runtime_api.h>
namespace bridge_cuda {
struct CUDAStream {
  operator cudaStream_t() const { return nullptr; }
  cudaStream_t stream() const { return nullptr; }
  int device_index() const { return 0; }
};
inline CUDAStream getCurrentCUDAStream(int = -1) { return {}; }
inline CUDAStream getDefaultCUDAStream(int = -1) { return {}; }
struct CUDAGuard {
  template <class T> explicit CUDAGuard(T&&) {}
};
struct OptionalCUDAGuard {
  template <class T> explicit OptionalCUDAGuard(T&&) {}
};
inline cudaDeviceProp* getCurrentDeviceProperties() { return nullptr; }
inline int current_device() { return 0; }
} // namespace bridge_cuda
namespace at {
namespace cuda {
using namespace bridge_cuda;
}
struct DeviceGuard {
  template <class T> explicit DeviceGuard(T&&) {}
};
template <class T> int device_of(const T&) { return 0; }
} // namespace at
namespace c10 {
namespace cuda {
using namespace bridge_cuda;
}
using at::DeviceGuard;
} // namespace c10
namespace torch {
namespace cuda {
using namespace bridge_cuda;
}
using at::device_of;
} // namespace torch
#define C10_CUDA_CHECK(...) (void)(__VA_ARGS__)
#define AT_CUDA_CHECK(...) (void)(__VA_ARGS__)
#define C10_CUDA_KERNEL_LAUNCH_CHECK() (void)0
#endif

#define TORCH_CHECK(...) STD_TORCH_CHECK(__VA_ARGS__)
#define TORCH_INTERNAL_ASSERT(...) STD_TORCH_CHECK(__VA_ARGS__)
#define AT_ASSERTM(...) STD_TORCH_CHECK(__VA_ARGS__)
#define AT_ASSERT(...) STD_TORCH_CHECK(__VA_ARGS__)
#define AT_CHECK(...) STD_TORCH_CHECK(__VA_ARGS__)

// The body is compiled once, for float: what it does with tensors does not depend on the type.
#define BRIDGE_BODY(type, ...)                  \
  [&] {                                         \
    (void)(type);                               \
    using scalar_t [[maybe_unused]] = float;    \
    using index_t [[maybe_unused]] = int64_t;   \
    return __VA_ARGS__();                       \
  }()
#define AT_DISPATCH_FLOATING_TYPES(type, name, ...) BRIDGE_BODY(type, __VA_ARGS__)
#define AT_DISPATCH_FLOATING_TYPES_AND_HALF(type, name, ...) BRIDGE_BODY(type, __VA_ARGS__)
#define AT_DISPATCH_FLOATING_TYPES_AND(a, type, name, ...) BRIDGE_BODY(type, __VA_ARGS__)
#define AT_DISPATCH_FLOATING_TYPES_AND2(a, b, type, name, ...) BRIDGE_BODY(type, __VA_ARGS__)
#define AT_DISPATCH_FLOATING_TYPES_AND3(a, b, c, type, name, ...) BRIDGE_BODY(type, __VA_ARGS__)
#define AT_DISPATCH_ALL_TYPES(type, name, ...) BRIDGE_BODY(type, __VA_ARGS__)
#define AT_DISPATCH_ALL_TYPES_AND(a, type, name, ...) BRIDGE_BODY(type, __VA_ARGS__)
#define AT_DISPATCH_ALL_TYPES_AND2(a, b, type, name, ...) BRIDGE_BODY(type, __VA_ARGS__)
#define AT_DISPATCH_ALL_TYPES_AND3(a, b, c, type, name, ...) BRIDGE_BODY(type, __VA_ARGS__)
#define AT_DISPATCH_INTEGRAL_TYPES(type, name, ...) BRIDGE_BODY(type, __VA_ARGS__)
#define AT_DISPATCH_INDEX_TYPES(type, name, ...) BRIDGE_BODY(type, __VA_ARGS__)
