// The quantiser on eight elements a lane; four neighbouring lanes have a block of 32 and find its maximum together.
#pragma once

#include "common/vec16.cuh"
#include "mxfp8_moe/dequantize.cuh"

namespace abiding::mxfp8_moe {

// Lanes 4i .. 4i + 3 call this together.
__device__ __forceinline__ uint8_t code_of_block(const float (&x)[8]) {
  float amax = fabsf(x[0]);
#pragma unroll
  for (int i = 1; i < 8; ++i) amax = fmaxf(amax, fabsf(x[i]));
  const unsigned lanes = 0xFu << (threadIdx.x % 32 & ~3u);
  amax = fmaxf(amax, __shfl_xor_sync(lanes, amax, 1));
  amax = fmaxf(amax, __shfl_xor_sync(lanes, amax, 2));
  return quantize_code(amax);
}

template <class T>
__device__ __forceinline__ uint2 quantize_octet(const uint4& packed, uint8_t& code) {
  float x[8];
  unpack<T>(packed, x);
  code = code_of_block(x);
  uint32_t pairs[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) pairs[i] = quantize_pair(x[2 * i], x[2 * i + 1], code);
  return {pairs[0] | pairs[1] << 16, pairs[2] | pairs[3] << 16};
}

// What the quantiser would keep of each element, as bf16.
__device__ __forceinline__ uint4 round_octet(const float (&x)[8]) {
  const uint8_t code = code_of_block(x);
  uint4 words;
  uint32_t* word = &words.x;
#pragma unroll
  for (int i = 0; i < 4; ++i) word[i] = dequantize_pair(quantize_pair(x[2 * i], x[2 * i + 1], code), code);
  return canonical_nans<__nv_bfloat16>(words);
}
template <class T>
__device__ __forceinline__ uint4 round_octet(const uint4& packed) {
  float x[8];
  unpack<T>(packed, x);
  return round_octet(x);
}

// Eight of 16 elements for eight of them interleaved (params.h). Lanes 2i and 2i + 1, which have the 16, call this together.
__device__ __forceinline__ uint4 interleave(const uint4& octet) {
  const bool odd = threadIdx.x % 2 == 1;
  const unsigned lanes = 3u << (threadIdx.x % 32 & ~1u);
  const uint32_t first = __shfl_xor_sync(lanes, odd ? octet.x : octet.y, 1);
  const uint32_t second = __shfl_xor_sync(lanes, odd ? octet.z : octet.w, 1);
  return odd ? uint4{first, second, octet.y, octet.w} : uint4{octet.x, octet.z, first, second};
}

}  // namespace abiding::mxfp8_moe
