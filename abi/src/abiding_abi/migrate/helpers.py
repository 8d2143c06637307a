"""Functions that a file gets where its code calls them, in front of that code."""

from __future__ import annotations

import re
from dataclasses import dataclass

STREAM, BLAS, PROPERTIES = "abi_current_stream", "abi_blas_handle", "abi_device_properties"
ACCESSOR, PACKED = "abi_accessor", "abi_packed_accessor"


@dataclass(frozen=True)
class Helper:
    """One function: the rule that brings it, and its lines."""

    rule: str
    lines: tuple[str, ...]


HELPERS: dict[str, Helper] = {
    STREAM: Helper(
        "CUD001",
        (
            "// torch's current stream of a device, by default of the current one.",
            "static inline cudaStream_t abi_current_stream(int32_t device = -1) {",
            "  if (device < 0) device = torch::stable::accelerator::getCurrentDeviceIndex();",
            "  void* stream = nullptr;",
            "  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));",
            "  return static_cast<cudaStream_t>(stream);",
            "}",
        ),
    ),
    BLAS: Helper(
        "CUD004",
        (
            "// torch's cuBLAS handle, with its workspace, for the current device and stream.",
            "static inline cublasHandle_t abi_blas_handle() {",
            "  void* handle = nullptr;",
            "  TORCH_ERROR_CODE_CHECK(torch_get_current_cuda_blas_handle(&handle));",
            "  return static_cast<cublasHandle_t>(handle);",
            "}",
        ),
    ),
    PROPERTIES: Helper(
        "CUD005",
        (
            "// A device's properties, by default of the current one; asked for once, since that takes a millisecond.",
            "static inline cudaDeviceProp* abi_device_properties(int32_t device = -1) {",
            "  static cudaDeviceProp properties[64];",
            "  static std::once_flag known[64];",
            "  if (device < 0) device = torch::stable::accelerator::getCurrentDeviceIndex();",
            '  STD_TORCH_CHECK(device < 64, "device ", device, " is beyond the 64 whose properties are kept");',
            "  std::call_once(known[device], [device] {",
            "    STD_CUDA_CHECK(cudaGetDeviceProperties(&properties[device], device));",
            "  });",
            "  return &properties[device];",
            "}",
        ),
    ),
    ACCESSOR: Helper(
        "MET031",
        (
            "// t.accessor<T, N>(), which asks for N dimensions.",
            "template <typename T, size_t N>",
            "static inline auto abi_accessor(const torch::stable::Tensor& t) {",
            '  STD_TORCH_CHECK(t.dim() == int64_t(N), "expected ", N, " dimensions, but the tensor has ", t.dim());',
            "  T* data = nullptr;",
            "  if constexpr (std::is_same_v<T, std::remove_const_t<T>>) data = t.mutable_data_ptr<T>();",
            "  else data = t.const_data_ptr<std::remove_const_t<T>>();",
            "  return torch::headeronly::HeaderOnlyTensorAccessor<T, N>(data, t.sizes().data(), t.strides().data());",
            "}",
        ),
    ),
    PACKED: Helper(
        "MET032",
        (
            "// t.packed_accessor32 and 64, which ask for N dimensions, and the former for less than 2^31 elements.",
            "template <typename T, size_t N, template <typename U> class Traits, typename Index>",
            "static inline auto abi_packed_accessor(const torch::stable::Tensor& t) {",
            '  STD_TORCH_CHECK(t.dim() == int64_t(N), "expected ", N, " dimensions, but the tensor has ", t.dim());',
            "  const bool fits = sizeof(Index) > 4 || t.numel() <= 2147483647;",
            '  STD_TORCH_CHECK(fits, t.numel(), " elements are too many for indices of 32 bits");',
            "  T* data = nullptr;",
            "  if constexpr (std::is_same_v<T, std::remove_const_t<T>>) data = t.mutable_data_ptr<T>();",
            "  else data = t.const_data_ptr<std::remove_const_t<T>>();",
            "  return torch::headeronly::HeaderOnlyGenericPackedTensorAccessor<T, N, Traits, Index>(",
            "      data, t.sizes().data(), t.strides().data());",
            "}",
        ),
    ),
}
"""By name."""


def helpers_of(code: str) -> list[str]:
    """Helpers that a text calls and that it has not yet."""
    return [name for name in HELPERS if name.upper() not in code and re.search(rf"\b{name}\s*[(<]", code)]


def helper_lines(name: str) -> list[str]:
    """A helper's lines, which several headers may bring into one unit."""
    guard = name.upper()
    return [f"#ifndef {guard}", f"#define {guard}", *HELPERS[name].lines, "#endif"]
