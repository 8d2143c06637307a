// Functions that torch's stable API lacks, each by one call of the dispatcher. Written by abiding-abi @version@
// (abiding-abi wrappers); the schemas were compared with torch 2.10 to 2.15. Names and schemas of aten operators carry
// no promise: a release that changes one makes the call fail at run time, so test with each new release.
#pragma once

#include <torch/csrc/stable/c/shim.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/stableivalue_conversions.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <optional>
#include <string>
#include <tuple>
#include <type_traits>
#include <vector>

#ifdef STABLE_TORCH_ERROR_CODE_CHECK
#define ABI_OPS_CHECK(call) STABLE_TORCH_ERROR_CODE_CHECK(call)
#else
#define ABI_OPS_CHECK(call) TORCH_ERROR_CODE_CHECK(call)
#endif

namespace abi_ops {
using torch::headeronly::ScalarType;
using torch::stable::Device;
using torch::stable::Tensor;
using IntArray = torch::headeronly::IntHeaderOnlyArrayRef;

namespace detail {
using torch::stable::detail::from;
using torch::stable::detail::to;
} // namespace detail
