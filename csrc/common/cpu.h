// The CPU side of an operator call; its CUDA twin in shape is common/cuda.h.
#pragma once

#include "common/check.h"

namespace abiding {

class CpuScope {
 public:
  explicit CpuScope(const Tensor&) {}

  BadIndex find_bad(const IndexRule& rule) const {
    for (int64_t i = 0; i < rule.indices.size; ++i)
      if (!rule.accepts(i)) return {i, rule.indices[i]};
    return {};
  }
};

}  // namespace abiding
