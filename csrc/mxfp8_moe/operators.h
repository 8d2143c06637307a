// The group's operators over a backend: check, look at index values if asked to, launch. Both backends register these.
#pragma once

#include <array>

#include "common/registration.h"
#include "mxfp8_moe/ops.h"

namespace abiding::mxfp8_moe {

// Scope is CpuScope or CudaScope: it makes the tensor's device current, finds bad indices and runs a struct of
// params.h. choose_grouped_mm(op, scope, compute, gemms) is the backend's choice of an implementation, made once per
// call for all of its GEMMs; for Compute::kFp8 these have a_scales, which one that reads bf16 rows gets without.
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
    if (mm.compute == Compute::kFp8) check_row_codes(op, scope, "weight_scales", mm.gemm);
    if (mm.gemm.groups.rows == 0) return;
    Tensor scales;
    if (mm.compute == Compute::kFp8) {
      scales = new_empty({op, "a", a}, {mm.gemm.groups.rows * static_cast<int64_t>(sizeof(float))});
      mm.row_scales.out = static_cast<float*>(scales.mutable_data_ptr());
      mm.gemm.a_scales = mm.row_scales.out;
    }
    const auto& impl = choose_grouped_mm(op, scope, mm.compute, std::array{&mm.gemm});
    if (!mm.quantized) return scope.run(mm.gemm, impl);
    if (impl.row_format == RowFormat::kE4m3) {
      scope.run(mm.row_scales);
      return scope.run(mm.gemm, impl);
    }
    mm.gemm.a_scales = nullptr;
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

  static void quantize(const Tensor& input, std::optional<Tensor> offsets, bool ends, bool rowwise, const Tensor& data,
                       const Tensor& scales) {
    run(kQuantize, input, check_quantize(input, offsets, ends, rowwise, data, scales));
  }

  static void rebase(const Tensor& weight, const Tensor& weight_scales, const Tensor& out, const Tensor& out_scales,
                     const Tensor& counts, const Tensor& errors) {
    RebaseParams p = check_rebase(weight, weight_scales, out, out_scales, counts, errors);
    const Scope scope(weight);
    const Tensor tallies =
        new_empty({kRebase, "out_scales", out_scales}, {p.units() * static_cast<int64_t>(sizeof(RebaseTally))});
    p.tallies = static_cast<RebaseTally*>(tallies.mutable_data_ptr());
    scope.run(p);
  }

  static void round(const Tensor& input, const Tensor& out) {
    const RoundParams p = check_round(input, out);
    const Scope scope(input);
    if (p.rows > 0) scope.run(p);
  }

  static void grouped_mm(const Tensor& a, std::optional<Tensor> a_scales, const Tensor& weight,
                         const Tensor& weight_scales, std::optional<Tensor> offsets, bool ends, int64_t compute,
                         const Tensor& out) {
    run(kGroupedMm, a, check_grouped_mm(a, a_scales, weight, weight_scales, offsets, ends, compute, out));
  }

  static std::string implementation(const Tensor& like, int64_t rows, int64_t experts, std::vector<int64_t> n,
                                    std::vector<int64_t> k, int64_t compute) {
    const Compute how = check_compute(kImplementation, compute);
    const std::vector<GroupedMmParams> gemms = check_implementation(rows, experts, n, k, how);
    std::vector<const GroupedMmParams*> all;
    for (const GroupedMmParams& gemm : gemms) all.push_back(&gemm);
    const Scope scope(like);
    return choose_grouped_mm(kImplementation, scope, how, all).name;
  }

  static void moe(const Tensor& x, const Tensor& w13, const Tensor& s13, const Tensor& w2, const Tensor& s2,
                  const Tensor& topk_ids, const Tensor& topk_weights, int64_t activation, bool w8a8,
                  std::optional<Tensor> workspace, std::optional<Tensor> expert_map,
                  std::optional<int64_t> global_experts, double swiglu_alpha, double swiglu_beta,
                  std::optional<double> swiglu_limit, int64_t compute, const Tensor& out) {
    Moe p = check_moe(x, w13, s13, w2, s2, topk_ids, topk_weights, activation, w8a8, workspace, compute, out);
    set_activation(p.activate, swiglu_alpha, swiglu_beta, swiglu_limit);
    set_expert_parallel(p, {kMoe, "x", x}, expert_map, global_experts);
    if (workspace && expert_map) {
      const Argument map{kMoe, "expert_map", *expert_map};
      check_memory_of_its_own({kMoe, "workspace", *workspace}, kMoe, {&map});
    }
    const Scope scope(x);
    check_index_values(kMoe, scope, {expert_rule(p.route), expert_map_rule(p.route)});
    if (p.compute == Compute::kFp8) {
      check_row_codes(kMoe, scope, "s13", p.gate_up);
      check_row_codes(kMoe, scope, "s2", p.down);
    }
    if (p.route.tokens == 0) return;
    const Tensor space = workspace ? *workspace : new_empty({kMoe, "w13", w13}, {p.layout.bytes});
    p.place(space.mutable_data_ptr());
    scope.run(p.route);
    if (p.route.experts > 0) {
      const auto& impl = choose_grouped_mm(kMoe, scope, p.compute, std::array{&p.gate_up, &p.down});
      p.set_format(impl.row_format);
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
    m.impl("mxfp8_rebase", ABIDING_BOX(rebase));
    m.impl("mxfp8_round", ABIDING_BOX(round));
    m.impl("mxfp8_grouped_mm", ABIDING_BOX(grouped_mm));
    m.impl("mxfp8_implementation", ABIDING_BOX(implementation));
    m.impl("mxfp8_moe", ABIDING_BOX(moe));
  }
};

}  // namespace abiding::mxfp8_moe
