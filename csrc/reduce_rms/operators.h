// The group's operators over a backend, CpuScope or CudaScope: check, find the communicator, run. Both backends
// register these.
#pragma once

#include <tuple>

#include "common/registration.h"
#include "peer/fault.h"
#include "reduce_rms/ops.h"

namespace abiding::reduce_rms {

constexpr uint64_t kTableTimeoutNs = 300'000'000'000;

template <class Scope>
struct Operators {
  static void run(const char* op, int64_t handle, const char* name, const Tensor& rows, const ReduceRmsParams& p) {
    const Scope scope(rows);
    peer::with_communicator(op, "comm", handle, name, rows, [&](const peer::Communicator& communicator) {
      if (p.tokens > 0) scope.run(p, communicator.peers(call_of(p)));
    });
  }

  static Tensor reduce_rms(const Tensor& input, const Tensor& weight, const Tensor& state, int64_t comm, double eps) {
    Argument("reduce_rms", "state", state).same_device(Argument("reduce_rms", "input", input));
    const RmsNorm call = check_rms_norm("reduce_rms", "input", input, "weight", weight, eps);
    run("reduce_rms", comm, "input", input, call.params);
    return call.out;
  }

  static std::tuple<Tensor, Tensor> reduce_rms_qk(const Tensor& qkv, const Tensor& weight_q, const Tensor& weight_k,
                                                  const Tensor& state, int64_t comm, double eps) {
    Argument("reduce_rms_qk", "state", state).same_device(Argument("reduce_rms_qk", "qkv", qkv));
    const QkNorm call = check_qk_norm("reduce_rms_qk", qkv, "weight_q", weight_q, "weight_k", weight_k, eps);
    run("reduce_rms_qk", comm, "qkv", qkv, call.params);
    return {call.q, call.k};
  }

  static void run_table(const char* op, const char* name, const Tensor& rows, const Tensor& workspace, int64_t rank,
                        int64_t nranks, const ReduceRmsParams& p) {
    check_rank(op, rank, nranks);
    check_table(op, workspace, {op, name, rows}, nranks);
    TableParams table{};
    table.pointers = static_cast<void* const*>(workspace.const_data_ptr());
    table.rank = static_cast<int>(rank);
    table.ranks = static_cast<int>(nranks);
    table.timeout_ns = kTableTimeoutNs;
    const Scope scope(rows);
    if (p.tokens > 0) scope.run(p, table);
  }

  static Tensor minimax_allreduce_rms(const Tensor& input, const Tensor& norm_weight, const Tensor& workspace,
                                      int64_t rank, int64_t nranks, double eps) {
    const char* op = "minimax_allreduce_rms";
    const Argument rows{op, "input", input};
    check(input.dim() >= 1, op, "input has shape ", rows.shape(), "; expected at least one dimension");
    rows.contiguous();
    const int64_t columns = input.size(input.dim() - 1);
    const Tensor flat = torch::stable::view(input, {columns ? input.numel() / columns : 0, columns});
    const RmsNorm call = check_rms_norm(op, "input", flat, "norm_weight", norm_weight, eps);
    run_table(op, "input", flat, workspace, rank, nranks, call.params);
    return torch::stable::view(call.out, input.sizes());
  }

  static std::tuple<Tensor, Tensor> minimax_allreduce_rms_qk(const Tensor& qkv, const Tensor& norm_weight_q,
                                                             const Tensor& norm_weight_k, const Tensor& workspace,
                                                             int64_t q_size, int64_t kv_size, int64_t rank,
                                                             int64_t nranks, double eps) {
    const char* op = "minimax_allreduce_rms_qk";
    const QkNorm call = check_qk_norm(op, qkv, "norm_weight_q", norm_weight_q, "norm_weight_k", norm_weight_k, eps);
    check(q_size == norm_weight_q.numel(), op, "q_size is ", q_size, "; expected the ", norm_weight_q.numel(),
          " elements of norm_weight_q");
    check(kv_size == norm_weight_k.numel(), op, "kv_size is ", kv_size, "; expected the ", norm_weight_k.numel(),
          " elements of norm_weight_k");
    run_table(op, "qkv", qkv, workspace, rank, nranks, call.params);
    return {call.q, call.k};
  }

  static void implement(Library& m) {
    m.impl("reduce_rms", ABIDING_BOX(reduce_rms));
    m.impl("reduce_rms_qk", ABIDING_BOX(reduce_rms_qk));
    m.impl("minimax_allreduce_rms", ABIDING_BOX(minimax_allreduce_rms));
    m.impl("minimax_allreduce_rms_qk", ABIDING_BOX(minimax_allreduce_rms_qk));
  }
};

}  // namespace abiding::reduce_rms
