// 16-byte vectors of eight 16-bit floats, and the CUDA types of dtypes.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "common/dtypes.h"

namespace abiding {

// The C++ type of a dtype in kernels.
template <DType kDType>
struct CudaTypeOf;
template <>
struct CudaTypeOf<DType::kBfloat16> {
  using type = __nv_bfloat16;
};
template <>
struct CudaTypeOf<DType::kFloat16> {
  using type = __half;
};
template <>
struct CudaTypeOf<DType::kFloat32> {
  using type = float;
};
template <class Tag>  // a DTypeTag
using CudaType = typename CudaTypeOf<Tag::value>::type;

__device__ __forceinline__ float2 to_floats(__nv_bfloat162 pair) { return __bfloat1622float2(pair); }
__device__ __forceinline__ float2 to_floats(__half2 pair) { return __half22float2(pair); }

template <class T>
struct Vec2;
template <>
struct Vec2<__nv_bfloat16> {
  using type = __nv_bfloat162;
  static constexpr uint32_t kInfinity = 0x7F80, kNan = 0x7FC0;
  static __device__ __forceinline__ type round(float a, float b) { return __floats2bfloat162_rn(a, b); }
};
template <>
struct Vec2<__half> {
  using type = __half2;
  static constexpr uint32_t kInfinity = 0x7C00, kNan = 0x7E00;
  static __device__ __forceinline__ type round(float a, float b) { return __floats2half2_rn(a, b); }
};

template <class T>
__device__ __forceinline__ void unpack(const uint4& packed, float (&x)[8]) {
  const uint32_t words[4] = {packed.x, packed.y, packed.z, packed.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    typename Vec2<T>::type pair;
    memcpy(&pair, &words[i], 4);
    const float2 two = to_floats(pair);
    x[2 * i] = two.x;
    x[2 * i + 1] = two.y;
  }
}

template <class T>
__device__ __forceinline__ uint4 pack(const float (&x)[8]) {
  uint32_t words[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const typename Vec2<T>::type pair = Vec2<T>::round(x[2 * i], x[2 * i + 1]);
    memcpy(&words[i], &pair, 4);
  }
  return {words[0], words[1], words[2], words[3]};
}

// Replaces every NaN by the positive quiet one: the conversion instructions each have their own pattern.
template <class T>
__device__ __forceinline__ uint4 canonical_nans(uint4 packed) {
  uint32_t* words = &packed.x;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    uint32_t low = words[i] & 0xFFFF, high = words[i] >> 16;
    if ((low & 0x7FFF) > Vec2<T>::kInfinity) low = Vec2<T>::kNan;
    if ((high & 0x7FFF) > Vec2<T>::kInfinity) high = Vec2<T>::kNan;
    words[i] = low | high << 16;
  }
  return packed;
}

}  // namespace abiding
