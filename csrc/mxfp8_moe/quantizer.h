// The arithmetic of MXFP8, the same bits on host and device: 32 elements share a UE8M0 code, and each is an e4m3 byte.
// Where FP8 tensor cores multiply, a row has one code.
#pragma once

#include "mxfp8_moe/params.h"

namespace abiding::mxfp8_moe {

// Codes of a row come in words of its scale tiles, the first in the low byte.
ABIDING_HD uint8_t code_of(uint32_t codes, int block) { return static_cast<uint8_t>(codes >> 8 * block); }
ABIDING_HD uint32_t same_codes(uint8_t code) { return code * 0x01010101u; }

// The bits of the first `blocks` of a word's codes; the others do not exist, at the end of K.
ABIDING_HD uint32_t codes_mask(int64_t blocks) {
  return blocks < kScaleTileBlocks ? (1u << 8 * static_cast<int>(blocks)) - 1 : ~0u;
}

// Accumulates the largest magnitude of a scale block, starting from NaN: a NaN counts only where all elements are NaN.
// fmaxf does the same on the device; on the host it lets signaling NaNs through.
ABIDING_HD float larger_magnitude(float amax, float x) {
  x = fabsf(x);
  return amax >= x || x != x ? amax : x;
}

// The code of a scale block: the least with amax <= 448 * 2^(code - 127), so that no finite element saturates. 0 for
// zeros and for what is below the least scale, 254 for an infinity, 255 (NaN) for a block of NaN.
ABIDING_HD uint8_t quantize_code(float amax) {
  const uint32_t bits = float_bits(amax) & 0x7FFFFFFF;
  if (bits >= 0x7F800000) return bits > 0x7F800000 ? 255 : 254;
  const int exponent = e4m3_scale_exponent(bits_float(bits));
  return exponent < -127 ? uint8_t{0} : ue8m0_encode(exponent);
}

// x * 2^exponent for exponent in [-252, 254], in two steps, since neither 2^-127 nor 2^128 is a normal float. Exact
// wherever the result is a float; elsewhere it becomes zero or infinity, as rounding to fewer bits would make of it.
ABIDING_HD float scale_by_pow2(float x, int exponent) {
  const int half = exponent / 2;
  return x * pow2(half) * pow2(exponent - half);
}

// The byte of an element: rounded to nearest even, infinities to +-448, NaN to 0x7F. Zeros keep their sign.
ABIDING_HD uint8_t quantize_element(float x, uint8_t code) { return e4m3_encode(scale_by_pow2(x, 127 - code)); }

ABIDING_HD uint16_t quantize_pair(float first, float second, uint8_t code) {
  return e4m3x2_encode(scale_by_pow2(first, 127 - code), scale_by_pow2(second, 127 - code));
}

// The nearest bfloat16, ties to even, as a float; every NaN as 0x7FC0.
ABIDING_HD float round_to_bfloat16(float x) {
  const uint32_t bits = float_bits(x);
  if ((bits & 0x7FFFFFFF) > 0x7F800000) return bits_float(0x7FC00000);
  return bits_float((bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000);
}

// The value of a byte under a code, as a bfloat16 kept in a float: every product of this group is made of these. Exact
// for codes 3 to 246. Below, the value is rounded to a multiple of 2^-133, bfloat16's least step; above, what is too
// large is infinite. NaN for bytes 0x7F and 0xFF and for code 255.
ABIDING_HD float dequantize(uint8_t byte, uint8_t code) {
  if (code == 255) return bits_float(0x7FC00000);
  return round_to_bfloat16(scale_by_pow2(e4m3_decode(byte), code - 127));
}

}  // namespace abiding::mxfp8_moe
