// The dtypes that operators accept: one enum for checks, parameters and kernels, and the dispatch from it to C++ types.
// This header needs no torch, because kernels include it; check.h maps torch's dtypes to these.
#pragma once

#include <cstdint>

namespace abiding {

// Kernels compare these values, so reordering them changes machine code.
enum class DType : int32_t {
  kBfloat16,
  kFloat16,
  kFloat32,
  kFloat64,
  kFloat8E4m3,
  kFloat8E5m2,
  kUint8,
  kInt8,
  kInt16,
  kInt32,
  kInt64,
  kBool,
  kOther
};

struct DTypeTraits {
  const char* name;  // as Python spells it, after "torch."
  int64_t bytes;
};

constexpr DTypeTraits traits_of(DType dtype) {
  switch (dtype) {
    case DType::kBfloat16: return {"bfloat16", 2};
    case DType::kFloat16: return {"float16", 2};
    case DType::kFloat32: return {"float32", 4};
    case DType::kFloat64: return {"float64", 8};
    case DType::kFloat8E4m3: return {"float8_e4m3fn", 1};
    case DType::kFloat8E5m2: return {"float8_e5m2", 1};
    case DType::kUint8: return {"uint8", 1};
    case DType::kInt8: return {"int8", 1};
    case DType::kInt16: return {"int16", 2};
    case DType::kInt32: return {"int32", 4};
    case DType::kInt64: return {"int64", 8};
    case DType::kBool: return {"bool", 1};
    case DType::kOther: break;
  }
  return {"another dtype", 0};
}
constexpr int64_t size_of(DType dtype) { return traits_of(dtype).bytes; }

// A dtype as a type, so that a generic lambda can take it: `decltype(tag)::value`.
template <DType kDType>
struct DTypeTag {
  static constexpr DType value = kDType;
};

// Returns body(DTypeTag<dtype>{}) for bfloat16 and float16. The checks have refused every other dtype.
template <class Body>
auto dispatch_16_bit(DType dtype, const Body& body) {
  return dtype == DType::kFloat16 ? body(DTypeTag<DType::kFloat16>{}) : body(DTypeTag<DType::kBfloat16>{});
}

// The same for float32, bfloat16 and float16.
template <class Body>
auto dispatch_floating(DType dtype, const Body& body) {
  return dtype == DType::kFloat32 ? body(DTypeTag<DType::kFloat32>{}) : dispatch_16_bit(dtype, body);
}

}  // namespace abiding
