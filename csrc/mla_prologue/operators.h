// The group's operators, registered once per backend: check the arguments, check index values if asked to, launch.
#pragma once

#include "common/registration.h"
#include "mla_prologue/ops.h"

namespace abiding::mla_prologue {

// Scope is CpuScope or CudaScope: it makes the tensor's device current and runs the run_cpu() or run_cuda() overload.
template <class Scope>
struct Operators {
  static void run(const char* op, const Tensor& kv, const PrologueParams& p) {
    const Scope scope(kv);
    check_index_values(op, scope, {slot_rule(p.slots, p.pages, p.block_size), position_rule(p)});
    if (p.tokens > 0) scope.run(p);
  }

  static void quant_insert_out(const Tensor& q, const Tensor& kv, const Tensor& cache, const Tensor& slots,
                               const Tensor& positions, const Tensor& cos_sin, double eps, int64_t block_size,
                               bool apply_q_norm, bool apply_q_rope, bool zero_padding, const Tensor& out) {
    run(kQuantInsert, kv,
        check_quant_insert(q, kv, cache, slots, positions, cos_sin, eps, block_size, apply_q_norm, apply_q_rope,
                           zero_padding, out));
  }

  static Tensor quant_insert(const Tensor& q, const Tensor& kv, const Tensor& cache, const Tensor& slots,
                             const Tensor& positions, const Tensor& cos_sin, int64_t padded_heads, double eps,
                             int64_t block_size) {
    Tensor out = allocate_out(q, padded_heads);
    quant_insert_out(q, kv, cache, slots, positions, cos_sin, eps, block_size, true, true, true, out);
    return out;
  }

  static void bf16_insert(const Tensor& q, const Tensor& kv, const Tensor& cache, const Tensor& slots,
                          const Tensor& positions, const Tensor& cos_sin, double eps, int64_t block_size) {
    run(kBf16Insert, kv, check_bf16_insert(q, kv, cache, slots, positions, cos_sin, eps, block_size));
  }

  static void fp8_insert(const Tensor& q, const Tensor& kv, const Tensor& q_fp8, const Tensor& cache,
                         const Tensor& slots, const Tensor& positions, const Tensor& cos_sin, const Tensor& fp8_scale,
                         const Tensor& q_fp8_scale_inv, double eps, int64_t block_size) {
    run(kFp8Insert, kv,
        check_fp8_insert(q, kv, q_fp8, cache, slots, positions, cos_sin, fp8_scale, q_fp8_scale_inv, eps, block_size));
  }

  static void kv_insert(const Tensor& kv, const Tensor& cache, const Tensor& slots, const Tensor& positions,
                        const Tensor& cos_sin, int64_t block_size) {
    run(kKvInsert, kv, check_kv_insert(kv, cache, slots, positions, cos_sin, block_size));
  }

  static void gather_kv(const Tensor& cache, const Tensor& slots, int64_t block_size, const Tensor& out) {
    const GatherParams p = check_gather(cache, slots, block_size, out);
    const Scope scope(out);
    check_index_values(kGather, scope, {slot_rule(p.slots, p.pages, p.block_size)});
    if (p.rows > 0) scope.run(p);
  }

  static void implement(Library& m) {
    m.impl("fused_deepseek_v4_qnorm_rope_kv_rope_quant_insert", ABIDING_BOX(quant_insert));
    m.impl("fused_deepseek_v4_qnorm_rope_kv_rope_quant_insert.out", ABIDING_BOX(quant_insert_out));
    m.impl("fused_deepseek_v4_qnorm_rope_kv_rope_full_cache_bf16_insert", ABIDING_BOX(bf16_insert));
    m.impl("fused_deepseek_v4_qnorm_rope_kv_rope_full_cache_fp8_insert", ABIDING_BOX(fp8_insert));
    m.impl("fused_deepseek_v4_kv_rope_quant_insert", ABIDING_BOX(kv_insert));
    m.impl("deepseek_v4_gather_kv", ABIDING_BOX(gather_kv));
  }
};

}  // namespace abiding::mla_prologue
