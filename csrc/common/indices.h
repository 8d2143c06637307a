// Index tensors of 32 or 64 bits, and the debug check of their values.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>

#include "common/numerics.h"

namespace abiding {

struct Indices {
  const void* data;
  int64_t size;
  bool wide;  // int64, else int32

  ABIDING_HD int64_t operator[](int64_t i) const { return from(data, i); }
  // Element `i` of the array of indices at `at`.
  ABIDING_HD int64_t from(const void* at, int64_t i) const {
    return wide ? static_cast<const int64_t*>(at)[i] : static_cast<const int32_t*>(at)[i];
  }
  ABIDING_HD const void* address(int64_t i) const { return static_cast<const char*>(data) + i * (wide ? 8 : 4); }
};

// The values of an index argument that a debug run accepts: low <= value < high.
struct IndexRule {
  const char* argument;
  Indices indices;
  int64_t low, high;

  ABIDING_HD int64_t size() const { return indices.size; }
  ABIDING_HD int64_t value(int64_t i) const { return indices[i]; }
  ABIDING_HD bool accepts(int64_t i) const { return low <= indices[i] && indices[i] < high; }
};

struct BadIndex {
  int64_t at = -1, value = 0;  // at < 0: none
};

// ABIDING_CHECK_INDICES=1 turns indices that would be skipped into errors; on a GPU that costs a synchronization.
inline bool index_checks_enabled() {
  const char* value = std::getenv("ABIDING_CHECK_INDICES");
  return value && std::strcmp(value, "1") == 0;
}

}  // namespace abiding
