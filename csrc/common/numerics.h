// Arithmetic, one definition for host and device: multiples, and the number formats float32, e4m3 and UE8M0.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define ABIDING_HD __host__ __device__ __forceinline__
#else
#define ABIDING_HD inline
#endif

namespace abiding {

ABIDING_HD constexpr int64_t round_up(int64_t x, int64_t step) { return (x + step - 1) / step * step; }

ABIDING_HD uint32_t float_bits(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  return bits;
}

ABIDING_HD float bits_float(uint32_t bits) {
  float x;
  memcpy(&x, &bits, 4);
  return x;
}

// 2^exponent for exponent in [-126, 127].
ABIDING_HD float pow2(int exponent) { return bits_float(static_cast<uint32_t>(exponent + 127) << 23); }

// float8 e4m3fn (OCP 8-bit floating point): round to nearest even, saturate at +-448, NaN to 0x7F.
ABIDING_HD uint8_t e4m3_encode(float x) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
  uint16_t pair;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(0.0f), "f"(x));
  return static_cast<uint8_t>(pair);
#else
  const uint32_t bits = float_bits(x), sign = bits >> 24 & 0x80;
  uint32_t magnitude = bits & 0x7FFFFFFF;
  if (magnitude > 0x7F800000) return 0x7F;
  if (magnitude >= 0x43E00000) return static_cast<uint8_t>(sign | 0x7E);  // from 448 up
  // Below 2^-6, adding 2^14 makes the adder round to multiples of the subnormal step 2^-9.
  if (magnitude < 0x3C800000)
    return static_cast<uint8_t>(sign | (float_bits(bits_float(magnitude) + 16384.0f) - 0x46800000));
  magnitude += 0x7FFFF + (magnitude >> 20 & 1);
  return static_cast<uint8_t>(sign | ((magnitude >> 20) - (120 << 3)));
#endif
}

// Two values, the first in the low byte: one instruction where the hardware has it.
ABIDING_HD uint16_t e4m3x2_encode(float first, float second) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
  uint16_t pair;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(second), "f"(first));
  return pair;
#else
  return static_cast<uint16_t>(e4m3_encode(first) | e4m3_encode(second) << 8);
#endif
}

ABIDING_HD float e4m3_decode(uint8_t code) {
  const uint32_t magnitude = code & 0x7F;
  float value;
  if (magnitude == 0x7F)
    value = bits_float(0x7FC00000);
  else if (magnitude < 8)
    value = static_cast<float>(magnitude) * 0x1p-9f;
  else
    value = bits_float((magnitude + (120 << 3)) << 20);
  return code & 0x80 ? -value : value;
}

// The smallest e with amax <= 448 * 2^e, for amax a positive normal float; an infinite amax counts as 2^128.
ABIDING_HD int e4m3_scale_exponent(float amax) {
  const uint32_t bits = float_bits(amax);
  return static_cast<int>(bits >> 23) - 135 + ((bits & 0x7FFFFF) > 0x600000);
}

// UE8M0: an 8-bit exponent with bias 127; 255 is NaN (OCP Microscaling formats).
ABIDING_HD uint8_t ue8m0_encode(int exponent) { return static_cast<uint8_t>(exponent + 127); }

ABIDING_HD float ue8m0_decode(uint8_t code) {
  if (code == 255) return bits_float(0x7FC00000);
  return code == 0 ? 0x1p-127f : bits_float(static_cast<uint32_t>(code) << 23);
}

}  // namespace abiding
