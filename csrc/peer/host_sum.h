// The rank-order sum on the host: float32 accumulation in the order of the ranks, rounded once; rank_sum.cuh is the
// device's. Plain loops over arrays, which the compiler vectorizes.
#pragma once

#include <cstdint>
#include <type_traits>

#include "common/dtypes.h"
#include "common/numerics.h"
#include "peer/protocol.h"

namespace abiding::peer {

// Conversions of 16-bit floats without branches or subnormal operands, which are slow. Every NaN becomes the same one,
// so that results do not depend on which NaN a processor keeps.
struct Float16 {
  static constexpr uint32_t kNan = 0x7E00;
  static float to_float(uint32_t half) {
    const int32_t magnitude = static_cast<int32_t>(half & 0x7FFF);
    const float subnormal = static_cast<float>(magnitude) * 0x1p-24f;
    const int32_t normal = (magnitude << 13) + (magnitude >= 0x7C00 ? 224 << 23 : 112 << 23);
    const uint32_t bits = magnitude < 0x400 ? float_bits(subnormal) : static_cast<uint32_t>(normal);
    return bits_float(bits | (half & 0x8000) << 16);
  }
  static uint32_t from_float(float value) {
    const uint32_t sign = float_bits(value) >> 16 & 0x8000;
    const int32_t magnitude = static_cast<int32_t>(float_bits(value) & 0x7FFFFFFF);
    const int32_t finite = magnitude < 0x47800000 ? magnitude : 0x47800000;  // 65536 and more: infinite
    const int32_t normal = ((finite + 0xFFF + (finite >> 13 & 1)) >> 13) - (112 << 10);
    // Below 2^-14, adding 0.5 makes the adder round to multiples of the subnormal step 2^-24.
    const int32_t subnormal =
        static_cast<int32_t>(float_bits(bits_float(static_cast<uint32_t>(magnitude)) + 0.5f)) - 0x3F000000;
    const uint32_t half = sign | static_cast<uint32_t>(magnitude < 0x38800000 ? subnormal : normal);
    return magnitude > 0x7F800000 ? kNan : half;
  }
};

struct Bfloat16 {
  static constexpr uint32_t kNan = 0x7FC0;
  static float to_float(uint32_t half) { return bits_float(half << 16); }
  static uint32_t from_float(float value) {
    const uint32_t bits = float_bits(value);
    const bool nan = static_cast<int32_t>(bits & 0x7FFFFFFF) > 0x7F800000;
    return nan ? kNan : (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
  }
};

struct Float32 {
  static constexpr uint32_t kNan = 0x7FC00000;
  static uint32_t from_float(float value) {
    const uint32_t bits = float_bits(value);
    return static_cast<int32_t>(bits & 0x7FFFFFFF) > 0x7F800000 ? kNan : bits;
  }
};

// The one of these that a dtype is.
template <class Tag>  // a DTypeTag
using HostFormat = std::conditional_t<Tag::value == DType::kFloat32, Float32,
                                      std::conditional_t<Tag::value == DType::kFloat16, Float16, Bfloat16>>;

// The sum of up to kChunkWords words per rank, which fit the L1 cache. A word is one Float32 or two 16-bit floats.
constexpr int kChunkWords = 128;
template <class Format>
class ChunkSum {
 public:
  static constexpr bool kIs16Bit = !std::is_same_v<Format, Float32>;

  void set(const uint32_t* words, int count) {
    for (int i = 0; i < count; ++i) low_[i] = low(words[i]);
    if constexpr (kIs16Bit)
      for (int i = 0; i < count; ++i) high_[i] = Format::to_float(words[i] >> 16);
  }
  void add(const uint32_t* words, int count) {
    for (int i = 0; i < count; ++i) low_[i] += low(words[i]);
    if constexpr (kIs16Bit)
      for (int i = 0; i < count; ++i) high_[i] += Format::to_float(words[i] >> 16);
  }
  void round(uint32_t* words, int count) const {
    for (int i = 0; i < count; ++i) words[i] = Format::from_float(low_[i]);
    if constexpr (kIs16Bit)
      for (int i = 0; i < count; ++i) words[i] |= Format::from_float(high_[i]) << 16;
  }

 private:
  static float low(uint32_t word) {
    if constexpr (kIs16Bit)
      return Format::to_float(word & 0xFFFF);
    else
      return bits_float(word);
  }

  float low_[kChunkWords], high_[kIs16Bit ? kChunkWords : 1];
};

}  // namespace abiding::peer
