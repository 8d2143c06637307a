// Sums on a host: float32 in the order of the ranks, rounded once. Plain loops over arrays, which compilers turn into vectors.
#pragma once

#include <cstdint>
#include <type_traits>

#include "common/dtypes.h"
#include "common/numerics.h"
#include "peer/protocol.h"

namespace abiding::peer {

// 16-bit floats without a branch and without subnormal operands, which a host may be told to treat as 0. Every NaN becomes
// one, so that results do not depend on which rank's NaN a processor keeps.
struct Float16 {
  static constexpr uint32_t kNan = 0x7E00;
  static float decode(uint32_t half) {
    const int32_t magnitude = static_cast<int32_t>(half & 0x7FFF);
    const float tiny = static_cast<float>(magnitude) * 0x1p-24f;  // the value of a subnormal
    const int32_t normal = (magnitude << 13) + (magnitude >= 0x7C00 ? 224 << 23 : 112 << 23);
    const uint32_t bits = magnitude < 0x400 ? float_bits(tiny) : static_cast<uint32_t>(normal);
    return bits_float(bits | (half & 0x8000) << 16);
  }
  static uint32_t encode(float value) {
    const uint32_t sign = float_bits(value) >> 16 & 0x8000;
    const int32_t magnitude = static_cast<int32_t>(float_bits(value) & 0x7FFFFFFF);
    const int32_t finite = magnitude < 0x47800000 ? magnitude : 0x47800000;  // from 65536 up: infinite
    const int32_t normal = ((finite + 0xFFF + (finite >> 13 & 1)) >> 13) - (112 << 10);
    // Below 2^-14 the adder rounds to multiples of the subnormal step 2^-24.
    const int32_t tiny =
        static_cast<int32_t>(float_bits(bits_float(static_cast<uint32_t>(magnitude)) + 0.5f)) - 0x3F000000;
    const uint32_t half = sign | static_cast<uint32_t>(magnitude < 0x38800000 ? tiny : normal);
    return magnitude > 0x7F800000 ? kNan : half;
  }
};

struct Bfloat16 {
  static constexpr uint32_t kNan = 0x7FC0;
  static float decode(uint32_t half) { return bits_float(half << 16); }
  static uint32_t encode(float value) {
    const uint32_t bits = float_bits(value);
    const bool nan = static_cast<int32_t>(bits & 0x7FFFFFFF) > 0x7F800000;
    return nan ? kNan : (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
  }
};

struct Float32 {
  static constexpr uint32_t kNan = 0x7FC00000;
  static uint32_t encode(float value) {
    const uint32_t bits = float_bits(value);
    return static_cast<int32_t>(bits & 0x7FFFFFFF) > 0x7F800000 ? kNan : bits;
  }
};

// Which of these a dtype is.
template <class Tag>  // a DTypeTag
using SumFormat = std::conditional_t<Tag::value == DType::kFloat32, Float32,
                                     std::conditional_t<Tag::value == DType::kFloat16, Float16, Bfloat16>>;

// The sums of as many words as the first cache likes; a word is one Float32, or two halves.
constexpr int kChunkWords = 128;
template <class T>
class ChunkSums {
 public:
  static constexpr bool kHalves = !std::is_same_v<T, Float32>;

  void set(const uint32_t* words, int count) {
    for (int i = 0; i < count; ++i) low_[i] = low(words[i]);
    if constexpr (kHalves)
      for (int i = 0; i < count; ++i) high_[i] = T::decode(words[i] >> 16);
  }
  void add(const uint32_t* words, int count) {
    for (int i = 0; i < count; ++i) low_[i] += low(words[i]);
    if constexpr (kHalves)
      for (int i = 0; i < count; ++i) high_[i] += T::decode(words[i] >> 16);
  }
  void round(uint32_t* words, int count) const {
    for (int i = 0; i < count; ++i) words[i] = T::encode(low_[i]);
    if constexpr (kHalves)
      for (int i = 0; i < count; ++i) words[i] |= T::encode(high_[i]) << 16;
  }

 private:
  static float low(uint32_t word) {
    if constexpr (kHalves)
      return T::decode(word & 0xFFFF);
    else
      return bits_float(word);
  }

  float low_[kChunkWords], high_[kHalves ? kChunkWords : 1];
};

}  // namespace abiding::peer
