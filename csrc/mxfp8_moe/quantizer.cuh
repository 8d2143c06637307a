// The MXFP8 quantizer in kernels: two bytes at once by the conversion instructions, and eight elements per lane (a
// 16-byte vector of bf16), of which four neighboring lanes hold a scale block.
#pragma once

#include "common/vec16.cuh"
#include "mxfp8_moe/quantizer.h"

namespace abiding::mxfp8_moe {

// The values of two e4m3 bytes, the first in the low half.
__device__ __forceinline__ __half2 decode_halves(uint32_t pair) {
#if __CUDA_ARCH__ >= 890
  uint32_t halves;
  asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(halves) : "h"(static_cast<uint16_t>(pair)));
  __half2 two;
  memcpy(&two, &halves, 4);
  return two;
#else
  return __floats2half2_rn(e4m3_decode(static_cast<uint8_t>(pair)), e4m3_decode(static_cast<uint8_t>(pair >> 8)));
#endif
}
__device__ __forceinline__ float2 decode_pair(uint32_t pair) {
#if __CUDA_ARCH__ >= 890
  return __half22float2(decode_halves(pair));
#else
  return {e4m3_decode(static_cast<uint8_t>(pair)), e4m3_decode(static_cast<uint8_t>(pair >> 8))};
#endif
}

// dequantize() of two bytes, the first in the low half; bf16x2, NaN in any pattern.
__device__ __forceinline__ uint32_t dequantize_pair(uint32_t pair, uint32_t code) {
  const float2 values = decode_pair(pair);
  const float scale = ue8m0_decode(static_cast<uint8_t>(code));
  const __nv_bfloat162 result = __floats2bfloat162_rn(values.x * scale, values.y * scale);
  uint32_t word;
  memcpy(&word, &result, 4);
  return word;
}

__device__ __forceinline__ float amax_of(const float (&x)[8]) {
  float amax = fabsf(x[0]);
#pragma unroll
  for (int i = 1; i < 8; ++i) amax = fmaxf(amax, fabsf(x[i]));
  return amax;
}

// The code of the scale block that lanes 4i .. 4i + 3 hold; they call this together.
__device__ __forceinline__ uint8_t block_code(const float (&x)[8]) {
  float amax = amax_of(x);
  const unsigned lanes = 0xFu << (threadIdx.x % 32 & ~3u);
  amax = fmaxf(amax, __shfl_xor_sync(lanes, amax, 1));
  amax = fmaxf(amax, __shfl_xor_sync(lanes, amax, 2));
  return quantize_code(amax);
}

__device__ __forceinline__ uint2 quantize_vec8(const float (&x)[8], uint8_t code) {
  uint32_t pairs[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) pairs[i] = quantize_pair(x[2 * i], x[2 * i + 1], code);
  return {pairs[0] | pairs[1] << 16, pairs[2] | pairs[3] << 16};
}

// What the quantizer would keep of each element, as bf16.
__device__ __forceinline__ uint4 round_vec8(const float (&x)[8], uint8_t code) {
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
  return round_vec8(x, block_code(x));
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

// One code for a whole row of `width` vectors, by a CTA of kRowThreads: store(vector, x, code) gets its elements as
// floats. load(vector) returns them as 16 bytes of T; it is called a second time for rows of more than
// kRowThreads * kCached vectors. Returns the code. All threads call this.
constexpr int kRowThreads = 128;
template <class T, int kCached, class Load, class Store>
__device__ __forceinline__ uint8_t quantize_row(int width, const Load& load, const Store& store) {
  __shared__ float warp_amax[kRowThreads / 32];
  uint4 cached[kCached];
  float x[8];
#pragma unroll
  for (int i = 0; i < kCached; ++i) {
    const int vector = threadIdx.x + i * kRowThreads;
    if (vector < width) cached[i] = load(vector);
  }
  float amax = __uint_as_float(0x7FC00000);  // NaN does not count
  const auto count = [&](const uint4& packed) {
    unpack<T>(packed, x);
    amax = fmaxf(amax, amax_of(x));
  };
#pragma unroll
  for (int i = 0; i < kCached; ++i)
    if (static_cast<int>(threadIdx.x) + i * kRowThreads < width) count(cached[i]);
  for (int vector = threadIdx.x + kCached * kRowThreads; vector < width; vector += kRowThreads) count(load(vector));
#pragma unroll
  for (int step = 16; step > 0; step /= 2) amax = fmaxf(amax, __shfl_xor_sync(~0u, amax, step));
  __syncthreads();  // a row before may still read warp_amax
  if (threadIdx.x % 32 == 0) warp_amax[threadIdx.x / 32] = amax;
  __syncthreads();
#pragma unroll
  for (const float one : warp_amax) amax = fmaxf(amax, one);
  const uint8_t code = quantize_code(amax);
#pragma unroll
  for (int i = 0; i < kCached; ++i) {
    const int vector = threadIdx.x + i * kRowThreads;
    if (vector >= width) continue;
    unpack<T>(cached[i], x);
    store(vector, x, code);
  }
  for (int vector = threadIdx.x + kCached * kRowThreads; vector < width; vector += kRowThreads) {
    unpack<T>(load(vector), x);
    store(vector, x, code);
  }
  return code;
}

}  // namespace abiding::mxfp8_moe
