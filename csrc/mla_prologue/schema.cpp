#include "common/schemas.h"

ABIDING_SCHEMAS(abiding, mla_prologue, m) {
  m.def(
      "fused_deepseek_v4_qnorm_rope_kv_rope_quant_insert(Tensor q_in, Tensor kv, Tensor! k_cache, Tensor slot_mapping, "
      "Tensor position_ids, Tensor cos_sin_cache, int q_head_padded, float eps, int cache_block_size) -> Tensor");
  m.def(
      "fused_deepseek_v4_qnorm_rope_kv_rope_quant_insert.out(Tensor q_in, Tensor kv, Tensor! k_cache, "
      "Tensor slot_mapping, Tensor position_ids, Tensor cos_sin_cache, float eps, int cache_block_size, "
      "bool apply_q_norm, bool apply_q_rope, bool zero_padding, *, Tensor! out) -> ()");
  m.def(
      "fused_deepseek_v4_qnorm_rope_kv_rope_full_cache_bf16_insert(Tensor! q, Tensor kv, Tensor! k_cache, "
      "Tensor slot_mapping, Tensor position_ids, Tensor cos_sin_cache, float eps, int cache_block_size) -> ()");
  m.def(
      "fused_deepseek_v4_qnorm_rope_kv_rope_full_cache_fp8_insert(Tensor q, Tensor kv, Tensor! q_fp8, "
      "Tensor! k_cache, Tensor slot_mapping, Tensor position_ids, Tensor cos_sin_cache, Tensor fp8_scale, "
      "Tensor q_fp8_scale_inv, float eps, int cache_block_size) -> ()");
  m.def(
      "fused_deepseek_v4_kv_rope_quant_insert(Tensor kv, Tensor! k_cache, Tensor slot_mapping, Tensor position_ids, "
      "Tensor cos_sin_cache, int cache_block_size) -> ()");
  m.def("deepseek_v4_gather_kv(Tensor k_cache, Tensor slot_mapping, int cache_block_size, *, Tensor! out) -> ()");
}
