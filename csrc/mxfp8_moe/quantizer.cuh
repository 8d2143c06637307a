// The MXFP8 quantizer in kernels: two bytes at once by the conversion instructions, and eight elements per lane (a
// 16-byte vector of bf16), of which four neighboring lanes hold a scale block.
#pragma once

#include "common/vec16.cuh"
#include "mxfp8_moe/quantizer.h"

namespace abiding::mxfp8_moe {

// dequantize() of two bytes, the first in the low half; bf16x2, NaN in any pattern.
__device__ __forceinline__ uint32_t dequantize_pair(uint32_t pair, uint32_t code) {
  float2 values;
#if __CUDA_ARCH__ >= 890
  uint32_t halves;
  asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(halves) : "h"(static_cast<uint16_t>(pair)));
  __half2 two;
  memcpy(&two, &halves, 4);
  values = __half22float2(two);
#else
  values = {e4m3_decode(static_cast<uint8_t>(pair)), e4m3_decode(static_cast<uint8_t>(pair >> 8))};
#endif
  const float scale = ue8m0_decode(static_cast<uint8_t>(code));
  const __nv_bfloat162 result = __floats2bfloat162_rn(values.x * scale, values.y * scale);
  uint32_t word;
  memcpy(&word, &result, 4);
  return word;
}

// The code of the scale block that lanes 4i .. 4i + 3 hold; they call this together.
__device__ __forceinline__ uint8_t block_code(const float (&x)[8]) {
  float amax = fabsf(x[0]);
#pragma unroll
  for (int i = 1; i < 8; ++i) amax = fmaxf(amax, fabsf(x[i]));
  const unsigned lanes = 0xFu << (threadIdx.x % 32 & ~3u);
  amax = fmaxf(amax, __shfl_xor_sync(lanes, amax, 1));
  amax = fmaxf(amax, __shfl_xor_sync(lanes, amax, 2));
  return quantize_code(amax);
}

template <class T>
__device__ __forceinline__ uint2 quantize_vec8(const uint4& packed, uint8_t& code) {
  float x[8];
  unpack<T>(packed, x);
  code = block_code(x);
  uint32_t pairs[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) pairs[i] = quantize_pair(x[2 * i], x[2 * i + 1], code);
  return {pairs[0] | pairs[1] << 16, pairs[2] | pairs[3] << 16};
}

// What the quantizer would keep of each element, as bf16.
__device__ __forceinline__ uint4 round_vec8(const float (&x)[8]) {
  const uint8_t code = block_code(x);
  uint4 words;
  uint32_t* word = &words.x;
#pragma unroll
  for (int i = 0; i < 4; ++i) word[i] = dequantize_pair(quantize_pair(x[2 * i], x[2 * i + 1], code), code);
  return canonical_nans<__nv_bfloat16>(words);
}
template <class T>
__device__ __forceinline__ uint4 round_vec8(const uint4& packed) {
  float x[8];
  unpack<T>(packed, x);
  return round_vec8(x);
}

// Eight of 16 elements in, eight of the same 16 interleaved (params.h) out. Lanes 2i and 2i + 1 hold the 16; they call
// this together.
__device__ __forceinline__ uint4 interleave(const uint4& vec8) {
  const bool odd = threadIdx.x % 2 == 1;
  const unsigned lanes = 3u << (threadIdx.x % 32 & ~1u);
  const uint32_t first = __shfl_xor_sync(lanes, odd ? vec8.x : vec8.y, 1);
  const uint32_t second = __shfl_xor_sync(lanes, odd ? vec8.z : vec8.w, 1);
  return odd ? uint4{first, second, vec8.y, vec8.w} : uint4{vec8.x, vec8.z, first, second};
}

}  // namespace abiding::mxfp8_moe
