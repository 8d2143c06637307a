// The CPU backend of an operator call. common/cuda.h has the same interface for CUDA.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "common/check.h"
#include "common/float_environment.h"

namespace abiding {

// The C++ type of a dtype on the CPU.
template <DType kDType>
struct HostTypeOf;
template <>
struct HostTypeOf<DType::kBfloat16> {
  using type = torch::headeronly::BFloat16;
};
template <>
struct HostTypeOf<DType::kFloat16> {
  using type = torch::headeronly::Half;
};
template <>
struct HostTypeOf<DType::kFloat32> {
  using type = float;
};
template <class Tag>  // a DTypeTag
using HostType = typename HostTypeOf<Tag::value>::type;

// torch's parallel_for with the floating-point environment of an operator in each of its threads, whose own may be
// anything.
template <class Body>
void parallel_for(int64_t begin, int64_t end, int64_t grain, const Body& body) {
  torch::stable::parallel_for(begin, end, grain, [&](int64_t first, int64_t last) {
    const DefaultFloatEnvironment environment;
    body(first, last);
  });
}

class CpuScope {
 public:
  explicit CpuScope(const Tensor&) {}

  // Runs the implementation of a params.h struct: the overload of run_cpu() in its namespace, found by ADL.
  template <class Params, class... Arguments>
  void run(const Params& params, const Arguments&... arguments) const {
    run_cpu(params, arguments...);
  }

  template <class Rule>
  BadIndex find_bad(const Rule& rule) const {
    for (int64_t i = 0; i < rule.size(); ++i)
      if (!rule.accepts(i)) return {i, rule.value(i)};
    return {};
  }
};

}  // namespace abiding
