// The activation between a layer's two GEMMs, in float32; one definition for host and device.
#pragma once

#include "mxfp8_moe/params.h"

namespace abiding::mxfp8_moe {

// gate * sigmoid(scale * gate), for a positive scale. The device's error is at most 2^-15 of the result, before that is
// rounded to bf16. It takes the side of the exponential that is below 1, since __fdividef returns 0 for large divisors.
ABIDING_HD float swish(float gate, float scale) {
#ifdef __CUDA_ARCH__
  const float small = __expf(-fabsf(scale * gate));
  return __fdividef(gate < 0 ? gate * small : gate, 1.0f + small);
#else
  return gate / (1.0f + expf(-scale * gate));
#endif
}

// Comparisons instead of fminf, so that a NaN stays one.
ABIDING_HD float activated(Activation activation, const SwigluConstants& swiglu, float gate, float up) {
  if (activation == Activation::kSilu) return swish(gate, 1.0f) * up;
  gate = gate > swiglu.limit ? swiglu.limit : gate;
  up = up > swiglu.limit ? swiglu.limit : up < -swiglu.limit ? -swiglu.limit : up;
  return swish(gate, swiglu.alpha) * (up + swiglu.beta);
}

}  // namespace abiding::mxfp8_moe
