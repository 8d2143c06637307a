// The contract of the group's operators: every argument is checked here, once, for both backends.
#pragma once

#include "common/check.h"
#include "reduce_rms/params.h"

namespace abiding::reduce_rms {

inline void check_rank(const char* op, int64_t rank, int64_t nranks) {
  check(1 <= nranks && nranks <= peer::kMaxRanks, op, "nranks is ", nranks, "; expected 1 to ", peer::kMaxRanks);
  check(0 <= rank && rank < nranks, op, "rank is ", rank, "; expected 0 or more and less than ", nranks);
}

inline void check_rows(const Argument& rows) {
  rows.dtype({DType::kFloat32, DType::kFloat16, DType::kBfloat16}).rank(2).dense_rows(1);
}

inline void check_weight(const Argument& weight, const Argument& rows) {
  weight.same_dtype(rows).same_device(rows).rank(1).contiguous();
}

inline Part part(const Tensor& weight, const Tensor& out) {
  return {weight.const_data_ptr(), out.mutable_data_ptr(), weight.numel(), 0.0f};
}

inline ReduceRmsParams params(const Argument& argument, const Tensor& rows, double eps) {
  ReduceRmsParams p{};
  p.input = rows.const_data_ptr();
  p.input_stride = rows.size(0) > 1 ? rows.stride(0) : rows.size(1);
  p.tokens = rows.size(0);
  p.eps = static_cast<float>(eps);
  p.dtype = argument.dtype();
  return p;
}

inline void check_table(const char* op, const Tensor& workspace, const Argument& rows, int64_t nranks) {
  const Argument table{op, "workspace", workspace};
  table.dtype({DType::kInt64}).rank(1).contiguous().same_device(rows);
  check(workspace.size(0) >= 3 * nranks + 2, op, "workspace has shape ", table.shape(), "; expected at least [",
        3 * nranks + 2, "] for ", nranks, " ranks");
}

struct RmsNorm {
  ReduceRmsParams params;
  Tensor out;
};

inline RmsNorm check_rms_norm(const char* op, const char* input_name, const Tensor& input, const char* weight_name,
                              const Tensor& weight, double eps) {
  const Argument rows{op, input_name, input}, scale{op, weight_name, weight};
  check_rows(rows);
  check_weight(scale, rows);
  scale.size(0, input.size(1), ", the columns of ", input_name);
  check_eps(op, eps);
  Tensor out = new_empty(rows, {input.size(0), input.size(1)});
  ReduceRmsParams p = params(rows, input, eps);
  p.parts[p.part_count++] = part(weight, out);
  return {p, out};
}

struct QkNorm {
  ReduceRmsParams params;
  Tensor q, k;
};

inline QkNorm check_qk_norm(const char* op, const Tensor& qkv, const char* weight_q_name, const Tensor& weight_q,
                            const char* weight_k_name, const Tensor& weight_k, double eps) {
  const Argument rows{op, "qkv", qkv}, scale_q{op, weight_q_name, weight_q}, scale_k{op, weight_k_name, weight_k};
  check_rows(rows);
  check_weight(scale_q, rows);
  check_weight(scale_k, rows);
  const int64_t q_width = weight_q.numel(), k_width = weight_k.numel();
  check(qkv.size(1) == q_width + 2 * k_width, op, "qkv has shape ", rows.shape(), "; expected ", q_width + 2 * k_width,
        " columns, q's ", q_width, " and twice k's ", k_width);
  check_eps(op, eps);
  Tensor q = new_empty(rows, {qkv.size(0), q_width}), k = new_empty(rows, {qkv.size(0), k_width});
  ReduceRmsParams p = params(rows, qkv, eps);
  p.parts[p.part_count++] = part(weight_q, q);
  p.parts[p.part_count++] = part(weight_k, k);
  return {p, q, k};
}

}  // namespace abiding::reduce_rms
