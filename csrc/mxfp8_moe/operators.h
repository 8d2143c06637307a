// The group's operators over a backend: check, look at index values if asked to, launch. Both backends register these.
#pragma once

#include "common/registration.h"
#include "mxfp8_moe/ops.h"

namespace abiding::mxfp8_moe {

// Scope is CpuScope or CudaScope: it makes the tensor's device current, finds bad indices and runs a struct of
// params.h. choose_grouped_mm(op, scope, gemms...) is the backend's choice of an implementation, made once per call.
template <class Scope>
struct Operators {
  static void run(const char* op, const Tensor& input, const QuantizeParams& p) {
    const Scope scope(input);
    check_index_values(op, scope, {offset_rule(p.groups), scale_offset_rule(p.groups, p.scale_buffer)});
    scope.run(p);
  }

  static void run(const char* op, const Tensor& a, GroupedMm mm) {
    const Scope scope(a);
    check_index_values(op, scope,
                       {offset_rule(mm.gemm.groups), scale_offset_rule(mm.gemm.groups, mm.dequantize.scale_buffer)});
    if (mm.gemm.groups.rows == 0) return;
    const auto& impl = choose_grouped_mm(op, scope, mm.gemm);
    if (!mm.quantized) return scope.run(mm.gemm, impl);
    const Tensor rows = new_empty({op, "a", a}, {a.size(0), 2 * a.size(1)});  // bf16, in bytes
    mm.dequantize.out = rows.mutable_data_ptr();
    mm.gemm.a = rows.const_data_ptr();
    mm.gemm.a_stride = mm.dequantize.out_stride;
    mm.gemm.interleaved = mm.dequantize.interleaved = impl.row_format == RowFormat::kBf16Interleaved;
    scope.run(mm.dequantize);
    scope.run(mm.gemm, impl);
  }

  static void experts_quant(const Tensor& input, const Tensor& problem_sizes, const Tensor& expert_offsets,
                            const Tensor& blockscale_offsets, const Tensor& quant_output, const Tensor& scale_factor) {
    run(kExpertsQuant, input,
        check_experts_quant(input, problem_sizes, expert_offsets, blockscale_offsets, quant_output, scale_factor));
  }

  static void raw_grouped_mm(const Tensor& a, const Tensor& b, const Tensor& sfa, const Tensor& sfb, const Tensor& out,
                             const Tensor& problem_sizes, const Tensor& expert_offsets,
                             const Tensor& blockscale_offsets) {
    run(kRawGroupedMm, a, check_raw_grouped_mm(a, b, sfa, sfb, out, problem_sizes, expert_offsets, blockscale_offsets));
  }

  static void quantize(const Tensor& input, std::optional<Tensor> offsets, bool ends, const Tensor& data,
                       const Tensor& scales) {
    run(kQuantize, input, check_quantize(input, offsets, ends, data, scales));
  }

  static void round(const Tensor& input, const Tensor& out) {
    const RoundParams p = check_round(input, out);
    const Scope scope(input);
    if (p.rows > 0) scope.run(p);
  }

  static void grouped_mm(const Tensor& a, std::optional<Tensor> a_scales, const Tensor& weight,
                         const Tensor& weight_scales, std::optional<Tensor> offsets, bool ends, const Tensor& out) {
    run(kGroupedMm, a, check_grouped_mm(a, a_scales, weight, weight_scales, offsets, ends, out));
  }

  static void moe(const Tensor& x, const Tensor& w13, const Tensor& s13, const Tensor& w2, const Tensor& s2,
                  const Tensor& topk_ids, const Tensor& topk_weights, int64_t activation, bool w8a8,
                  std::optional<Tensor> workspace, std::optional<Tensor> expert_map,
                  std::optional<int64_t> global_experts, double swiglu_alpha, double swiglu_beta,
                  std::optional<double> swiglu_limit, const Tensor& out) {
    Moe p = check_moe(x, w13, s13, w2, s2, topk_ids, topk_weights, activation, w8a8, workspace, out);
    set_activation(p.activate, swiglu_alpha, swiglu_beta, swiglu_limit);
    set_expert_parallel(p, {kMoe, "x", x}, expert_map, global_experts);
    const Scope scope(x);
    check_index_values(kMoe, scope, {expert_rule(p.route), expert_map_rule(p.route)});
    if (p.route.tokens == 0) return;
    const Tensor space = workspace ? *workspace : new_empty({kMoe, "w13", w13}, {p.layout.bytes});
    p.place(space.mutable_data_ptr());
    scope.run(p.route);
    if (p.route.experts > 0) {
      const auto& impl = choose_grouped_mm(kMoe, scope, p.gate_up, p.down);
      p.set_interleaved(impl.row_format == RowFormat::kBf16Interleaved);
      scope.run(p.gather);
      scope.run(p.gate_up, impl);
      scope.run(p.activate);
      scope.run(p.down, impl);
    }
    // Without local experts this follows route directly (the PDL contract in layer.cu), and writes zeros.
    scope.run(p.combine);
  }

  static void implement(Library& m) {
    m.impl("mxfp8_experts_quant", ABIDING_BOX(experts_quant));
    m.impl("cutlass_mxfp8_grouped_mm", ABIDING_BOX(raw_grouped_mm));
    m.impl("mxfp8_quantize", ABIDING_BOX(quantize));
    m.impl("mxfp8_round", ABIDING_BOX(round));
    m.impl("mxfp8_grouped_mm", ABIDING_BOX(grouped_mm));
    m.impl("mxfp8_moe", ABIDING_BOX(moe));
  }
};

}  // namespace abiding::mxfp8_moe
