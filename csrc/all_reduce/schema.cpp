#include "common/schemas.h"

// Upstream's schema (vLLM's custom all-reduce); csrc/peer has the other operators of that namespace.
ABIDING_SCHEMAS(abiding_custom_ar, all_reduce, m) {
  m.def("all_reduce(int fa, Tensor inp, Tensor! out, int reg_buffer, int reg_buffer_sz_bytes) -> ()");
}

// The same sum with its effect declared: `state` belongs to the communicator, and every call changes it.
ABIDING_SCHEMAS(abiding, all_reduce, m) {
  m.def("all_reduce(Tensor input, Tensor! state, int comm) -> Tensor");
  m.def("all_reduce.out(Tensor input, Tensor! state, int comm, *, Tensor! out) -> ()");
}
