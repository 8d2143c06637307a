#include "common/cuda.h"

#include "mxfp8_moe/kernels.h"
#include "mxfp8_moe/operators.h"

namespace abiding::mxfp8_moe {
namespace {

struct Backend : CudaScope {
  using CudaScope::CudaScope;
  void quantize(const QuantizeParams& p) const { raise_on_error(mxfp8_moe::quantize(p, stream())); }
  void round(const RoundParams& p) const { raise_on_error(mxfp8_moe::round(p, stream())); }
  void dequantize(const DequantizeParams& p) const { raise_on_error(mxfp8_moe::dequantize(p, stream())); }
  void grouped_mm(const GroupedMmParams& p) const { raise_on_error(mxfp8_moe::grouped_mm(p, stream())); }
  bool takes_interleaved() const {
    bool it_does = false;
    raise_on_error(mxfp8_moe::takes_interleaved(&it_does));
    return it_does;
  }
  void route(const RouteParams& p) const { raise_on_error(mxfp8_moe::route(p, stream())); }
  void gather(const GatherParams& p) const { raise_on_error(mxfp8_moe::gather(p, stream())); }
  void activate(const ActivateParams& p) const { raise_on_error(mxfp8_moe::activate(p, stream())); }
  void combine(const CombineParams& p) const { raise_on_error(mxfp8_moe::combine(p, stream())); }
};

}  // namespace

ABIDING_KERNELS(abiding, CUDA, mxfp8_moe, m) { Operators<Backend>::implement(m); }

}  // namespace abiding::mxfp8_moe
