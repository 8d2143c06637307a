// The argument checks of the group's operators, shared by both backends.
#pragma once

#include "common/check.h"
#include "mla_prologue/params.h"

namespace abiding::mla_prologue {

constexpr const char* kQuantInsert = "fused_deepseek_v4_qnorm_rope_kv_rope_quant_insert";
constexpr const char* kBf16Insert = "fused_deepseek_v4_qnorm_rope_kv_rope_full_cache_bf16_insert";
constexpr const char* kFp8Insert = "fused_deepseek_v4_qnorm_rope_kv_rope_full_cache_fp8_insert";
constexpr const char* kKvInsert = "fused_deepseek_v4_kv_rope_quant_insert";
constexpr const char* kGather = "deepseek_v4_gather_kv";

constexpr int64_t kRowStep = 8;          // kernels access rows as 16-byte vectors: strides are multiples of 8 elements
constexpr int64_t kMaxRows = 1LL << 31;  // rows per call, so that kernels can index them with 32 bits

inline Indices check_indices(const Argument& indices, const Argument& device) {
  indices.dtype({DType::kInt64, DType::kInt32}).rank(1).contiguous().same_device(device);
  return {indices.tensor().const_data_ptr(), indices.tensor().size(0), indices.dtype() == DType::kInt64};
}

// A cache of 584-byte records. Only the page stride is free: pages of several layers may share one allocation.
inline void check_record_cache(const char* op, const Argument& cache, int64_t block_size) {
  check(block_size >= 1 && block_size <= 1LL << 40, op, "cache_block_size is ", block_size,
        "; expected a number of tokens from 1 to 2^40");
  cache.dtype({DType::kUint8}).aligned(8);
  const Tensor& pages = cache.tensor();
  check(pages.dim() >= 2, op, "k_cache has shape ", cache.shape(), "; expected [pages, bytes per page]");
  int64_t page_bytes = 1;
  for (int64_t d = pages.dim() - 1; d >= 1; --d) {
    check(pages.size(d) <= 1 || pages.stride(d) == page_bytes, op, "k_cache has shape ", cache.shape(), " and strides ",
          cache.strides(), "; expected dense pages");
    page_bytes *= pages.size(d);
  }
  if (pages.size(0) == 0) return;
  const int64_t needed = block_size * kRecordBytes;
  check(page_bytes >= needed, op, "k_cache has pages of ", page_bytes, " bytes; expected at least ", needed, " for ",
        block_size, " tokens");
  if (pages.size(0) == 1) return;
  check(pages.stride(0) >= needed, op, "k_cache has a page stride of ", pages.stride(0), " bytes; expected at least ",
        needed, " for ", block_size, " tokens");
  check(pages.stride(0) % 8 == 0, op, "k_cache has a page stride of ", pages.stride(0),
        " bytes; expected a multiple of 8");
}

// A full cache, which holds unquantized bfloat16 rows or e4m3 rows: [pages, block_size, 512].
inline void check_full_cache(const char* op, const Argument& cache, int64_t block_size, int64_t element_size) {
  cache.rank(3).size(2, kHeadDim).dense_rows(16 / element_size).no_overlap().aligned(16);
  check(cache.tensor().size(1) == block_size && block_size >= 1, op, "cache_block_size is ", block_size,
        "; expected the cache's own, 1 or more, as in shape ", cache.shape());
}

// Q and its output. `out` may alias q row for row; under any other overlap a row's output would overwrite another row's
// input.
inline void check_query(const char* op, const Argument& q, const Argument& out, PrologueParams& params) {
  q.rank(3).size(2, kHeadDim).dense_rows(kRowStep).aligned(16);
  const Tensor &from = q.tensor(), &to = out.tensor();
  const int64_t out_element_size = static_cast<int64_t>(to.element_size());
  out.rank(3)
      .same_device(q)
      .size(0, from.size(0), " as q")
      .size(2, kHeadDim)
      .dense_rows(16 / out_element_size)
      .no_overlap()
      .aligned(16);
  check(to.size(1) >= from.size(1), op, out.name(), " has shape ", out.shape(), "; expected at least the ",
        from.size(1), " heads of q");
  params.heads = from.size(1);
  params.padded_heads = to.size(1);
  params.q = from.const_data_ptr();
  params.q_token_stride = from.stride(0);
  params.q_head_stride = from.stride(1);
  params.out = to.mutable_data_ptr();
  params.out_token_stride = to.stride(0);
  params.out_head_stride = to.stride(1);

  if (from.numel() == 0 || to.numel() == 0) return;
  const auto extent = [](const Tensor& t, int64_t element_size) {  // bytes from the first to one past the last
    return ((t.size(0) - 1) * t.stride(0) + (t.size(1) - 1) * t.stride(1) + kHeadDim) * element_size;
  };
  const char *q_begin = static_cast<const char*>(params.q), *out_begin = static_cast<const char*>(params.out);
  const bool disjoint = q_begin + extent(from, 2) <= out_begin || out_begin + extent(to, out_element_size) <= q_begin;
  const bool same = q_begin == out_begin && out_element_size == 2 &&
                    (from.size(0) == 1 || from.stride(0) == to.stride(0)) &&
                    (from.size(1) == 1 || from.stride(1) == to.stride(1));
  check(disjoint || same, op, out.name(), " overlaps q; expected separate memory, or exactly q's rows");
}

// The arguments of the KV side; all are on the device of `kv`.
inline void check_kv(const char* op, const Argument& kv, const Argument& cache, const Argument& slots,
                     const Argument& positions, const Argument& cos_sin, int64_t block_size, PrologueParams& params) {
  kv.dtype({DType::kBfloat16, DType::kFloat16}).rank(2).size(1, kHeadDim).dense_rows(kRowStep).aligned(16);
  cache.same_device(kv);
  cos_sin.dtype({DType::kFloat32}).rank(2).size(1, kRopeDim).contiguous().aligned(16).same_device(kv);
  params.tokens = kv.tensor().size(0);
  params.dtype = kv.dtype();
  params.kv = kv.tensor().const_data_ptr();
  params.kv_stride = kv.tensor().stride(0);
  params.slots = check_indices(slots, kv);
  params.positions = check_indices(positions, kv);
  check(params.positions.size == params.tokens, op, "position_ids has shape ", positions.shape(), "; expected [",
        params.tokens, "], one per row of kv");
  check(params.slots.size <= params.tokens, op, "slot_mapping has shape ", slots.shape(), "; expected at most [",
        params.tokens, "], the rows of kv");
  params.cos_sin = static_cast<const float*>(cos_sin.tensor().const_data_ptr());
  params.max_position = cos_sin.tensor().size(0);
  params.cache = static_cast<uint8_t*>(cache.tensor().mutable_data_ptr());
  params.pages = cache.tensor().size(0);
  params.block_size = block_size;
  check(params.tokens * (params.padded_heads + 1) < kMaxRows, op, "kv has ", params.tokens, " tokens, with ",
        params.padded_heads, " heads of Q each; expected fewer than 2^31 rows of both per call");
}

// The output of the operator that returns one. Its sizes are checked before memory is allocated.
inline Tensor allocate_out(const Tensor& q, int64_t padded_heads) {
  const Argument q_in{kQuantInsert, "q_in", q};
  q_in.dtype({DType::kBfloat16, DType::kFloat16}).rank(3).size(2, kHeadDim);
  check(padded_heads >= q.size(1) && padded_heads < kMaxRows, kQuantInsert, "q_head_padded is ", padded_heads,
        "; expected at least the ", q.size(1), " heads of q and less than 2^31");
  return new_empty(q_in, {q.size(0), padded_heads, int64_t{kHeadDim}});
}

inline PrologueParams check_quant_insert(const Tensor& q, const Tensor& kv, const Tensor& cache, const Tensor& slots,
                                         const Tensor& positions, const Tensor& cos_sin, double eps, int64_t block_size,
                                         bool apply_q_norm, bool apply_q_rope, bool zero_padding, const Tensor& out) {
  const char* op = kQuantInsert;
  const Argument q_in{op, "q_in", q}, kv_in{op, "kv", kv}, k_cache{op, "k_cache", cache}, result{op, "out", out};
  PrologueParams params{};
  q_in.dtype({DType::kBfloat16, DType::kFloat16});
  result.same_dtype(q_in);
  check_query(op, q_in, result, params);
  kv_in.same_dtype(q_in).same_device(q_in).rank(2).size(0, q.size(0), ", the tokens of q_in");
  check_record_cache(op, k_cache, block_size);
  check_kv(op, kv_in, k_cache, {op, "slot_mapping", slots}, {op, "position_ids", positions},
           {op, "cos_sin_cache", cos_sin}, block_size, params);
  check_eps(op, eps);
  params.page_stride = cache.stride(0);
  params.eps = static_cast<float>(eps);
  params.apply_q_norm = apply_q_norm;
  params.apply_q_rope = apply_q_rope;
  params.zero_padding = zero_padding;
  params.format = CacheFormat::kRecord;
  return params;
}

inline PrologueParams check_bf16_insert(const Tensor& q, const Tensor& kv, const Tensor& cache, const Tensor& slots,
                                        const Tensor& positions, const Tensor& cos_sin, double eps,
                                        int64_t block_size) {
  const char* op = kBf16Insert;
  const Argument q_in{op, "q", q}, kv_in{op, "kv", kv}, k_cache{op, "k_cache", cache};
  PrologueParams params{};
  q_in.dtype({DType::kBfloat16}).rank(3).no_overlap();
  check_query(op, q_in, q_in, params);
  kv_in.same_dtype(q_in).same_device(q_in).rank(2).size(0, q.size(0), ", the tokens of q");
  check_full_cache(op, k_cache.same_dtype(q_in), block_size, 2);
  check_kv(op, kv_in, k_cache, {op, "slot_mapping", slots}, {op, "position_ids", positions},
           {op, "cos_sin_cache", cos_sin}, block_size, params);
  check_eps(op, eps);
  params.page_stride = cache.stride(0) * 2;
  params.row_stride = cache.stride(1) * 2;
  params.eps = static_cast<float>(eps);
  params.apply_q_norm = params.apply_q_rope = true;
  params.format = CacheFormat::kBfloat16;
  return params;
}

inline PrologueParams check_fp8_insert(const Tensor& q, const Tensor& kv, const Tensor& q_fp8, const Tensor& cache,
                                       const Tensor& slots, const Tensor& positions, const Tensor& cos_sin,
                                       const Tensor& fp8_scale, const Tensor& q_fp8_scale_inv, double eps,
                                       int64_t block_size) {
  const char* op = kFp8Insert;
  const Argument q_in{op, "q", q}, kv_in{op, "kv", kv}, k_cache{op, "k_cache", cache}, result{op, "q_fp8", q_fp8};
  PrologueParams params{};
  q_in.dtype({DType::kBfloat16, DType::kFloat16}).rank(3);
  result.dtype({DType::kFloat8E4m3, DType::kUint8}).rank(3).size(1, q.size(1), ", the heads of q");
  check_query(op, q_in, result, params);
  kv_in.same_dtype(q_in).same_device(q_in).rank(2).size(0, q.size(0), ", the tokens of q");
  check_full_cache(op, k_cache.dtype({DType::kFloat8E4m3, DType::kUint8}), block_size, 1);
  check_kv(op, kv_in, k_cache, {op, "slot_mapping", slots}, {op, "position_ids", positions},
           {op, "cos_sin_cache", cos_sin}, block_size, params);
  check_eps(op, eps);
  const auto scale = [&](const char* name, const Tensor& value) {
    const Argument argument{op, name, value};
    argument.dtype({DType::kFloat32}).same_device(q_in);
    check(value.numel() == 1, op, name, " has shape ", argument.shape(), "; expected one element");
    return static_cast<const float*>(value.const_data_ptr());
  };
  params.kv_scale = scale("fp8_scale", fp8_scale);
  params.q_scale_inv = scale("q_fp8_scale_inv", q_fp8_scale_inv);
  params.page_stride = cache.stride(0);
  params.row_stride = cache.stride(1);
  params.eps = static_cast<float>(eps);
  params.apply_q_norm = params.apply_q_rope = true;
  params.format = CacheFormat::kE4m3;
  return params;
}

inline PrologueParams check_kv_insert(const Tensor& kv, const Tensor& cache, const Tensor& slots,
                                      const Tensor& positions, const Tensor& cos_sin, int64_t block_size) {
  const char* op = kKvInsert;
  const Argument kv_in{op, "kv", kv}, k_cache{op, "k_cache", cache};
  PrologueParams params{};
  check_record_cache(op, k_cache, block_size);
  check_kv(op, kv_in, k_cache, {op, "slot_mapping", slots}, {op, "position_ids", positions},
           {op, "cos_sin_cache", cos_sin}, block_size, params);
  params.page_stride = cache.stride(0);
  params.format = CacheFormat::kRecord;
  return params;
}

inline GatherParams check_gather(const Tensor& cache, const Tensor& slots, int64_t block_size, const Tensor& out) {
  const char* op = kGather;
  const Argument k_cache{op, "k_cache", cache}, result{op, "out", out}, slot_mapping{op, "slot_mapping", slots};
  check_record_cache(op, k_cache, block_size);
  result.dtype({DType::kBfloat16, DType::kFloat16}).rank(2).same_device(k_cache);
  const Indices indices = check_indices(slot_mapping, k_cache);
  result.size(0, indices.size, ", one per slot").size(1, kHeadDim).dense_rows(kRowStep).no_overlap().aligned(16);
  check(indices.size < kMaxRows, op, "slot_mapping has shape ", slot_mapping.shape(), "; expected fewer than 2^31");
  GatherParams params{};
  params.rows = indices.size;
  params.cache = static_cast<const uint8_t*>(cache.const_data_ptr());
  params.pages = cache.size(0);
  params.page_stride = cache.stride(0);
  params.block_size = block_size;
  params.slots = indices;
  params.out = out.mutable_data_ptr();
  params.out_stride = out.stride(0);
  params.dtype = result.dtype();
  return params;
}

// The rules that ABIDING_CHECK_INDICES=1 enforces. A negative slot means "skip this row", so it is always accepted.
inline IndexRule slot_rule(const Indices& slots, int64_t pages, int64_t block_size) {
  return {"slot_mapping", slots, INT64_MIN, pages * block_size};
}
inline IndexRule position_rule(const PrologueParams& params) {
  return {"position_ids", params.positions, 0, params.max_position};
}

}  // namespace abiding::mla_prologue
