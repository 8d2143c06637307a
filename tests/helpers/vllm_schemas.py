"""Names and argument lists of vLLM's prologue operators, as its releases declare them."""

QUANT = "fused_deepseek_v4_qnorm_rope_kv_rope_quant_insert"
BF16 = "fused_deepseek_v4_qnorm_rope_kv_rope_full_cache_bf16_insert"
FP8 = "fused_deepseek_v4_qnorm_rope_kv_rope_full_cache_fp8_insert"
TENSORS = "Tensor kv, Tensor! k_cache, Tensor slot_mapping, Tensor position_ids, Tensor cos_sin_cache"
QUANT_ARGUMENTS = f"Tensor q_in, {TENSORS}, int q_head_padded, float eps, int cache_block_size"
LATER = "bool apply_q_norm=True, bool kv_mxfp8=False, bool apply_q_rope=True, bool is_q_interleaved=False"
