// What stands between a layer's two products, in float32; one definition for host and device.
#pragma once

#include "mxfp8_moe/params.h"

namespace abiding::mxfp8_moe {

// A NaN stays one: comparisons, not fminf.
ABIDING_HD float activated(Activation activation, float gate, float up) {
  if (activation == Activation::kSilu) return gate / (1.0f + expf(-gate)) * up;
  gate = gate > 7.0f ? 7.0f : gate;
  up = up > 7.0f ? 7.0f : up < -7.0f ? -7.0f : up;
  return gate / (1.0f + expf(-1.702f * gate)) * (up + 1.0f);
}

}  // namespace abiding::mxfp8_moe
