// dequantize() of two bytes at once, by the conversion that newer hardware has.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "mxfp8_moe/quantizer.h"

namespace abiding::mxfp8_moe {

// The first byte is the low one; bf16x2 results, NaN in whatever pattern.
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

}  // namespace abiding::mxfp8_moe
