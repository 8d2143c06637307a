#include "common/schemas.h"

ABIDING_SCHEMAS(abiding, reduce_rms, m) {
  m.def("reduce_rms(Tensor input, Tensor weight, Tensor! state, int comm, float eps) -> Tensor");
  m.def(
      "reduce_rms_qk(Tensor qkv, Tensor weight_q, Tensor weight_k, Tensor! state, int comm, float eps) -> (Tensor, "
      "Tensor)");
  // Upstream's schemas. `workspace` is read; what its entries point to is written.
  m.def(
      "minimax_allreduce_rms(Tensor input, Tensor norm_weight, Tensor workspace, int rank, int nranks, float eps) -> "
      "Tensor");
  m.def(
      "minimax_allreduce_rms_qk(Tensor qkv, Tensor norm_weight_q, Tensor norm_weight_k, Tensor workspace, int q_size, "
      "int kv_size, int rank, int nranks, float eps) -> (Tensor, Tensor)");
}
