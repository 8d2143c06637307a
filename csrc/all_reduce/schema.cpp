#include "common/registration.h"

// The first ten keep upstream's schemas, so that an engine's own class can drive them.
ABIDING_SCHEMAS(abiding_custom_ar, all_reduce, m) {
  m.def("init_custom_ar(int[] ipc_tensors, Tensor rank_data, int rank, bool fully_connected) -> int");
  m.def("all_reduce(int fa, Tensor inp, Tensor! out, int reg_buffer, int reg_buffer_sz_bytes) -> ()");
  m.def("dispose(int fa) -> ()");
  m.def("meta_size() -> int");
  m.def("register_buffer(int fa, int[] ipc_tensors) -> ()");
  m.def("get_graph_buffer_ipc_meta(int fa) -> (int[], int[])");
  m.def("register_graph_buffers(int fa, int[][] handles, int[][] offsets) -> ()");
  m.def("allocate_shared_buffer_and_handle(int size) -> (int, Tensor)");
  m.def("open_mem_handle(Tensor mem_handle) -> int");
  m.def("free_shared_buffer(int ptr) -> ()");

  m.def("allocate_shared_memory_and_handle(int size) -> (int, Tensor)");
  m.def("close_mem_handle(int ptr) -> ()");
  m.def("configure(int fa, float timeout_s, int max_blocks, int one_shot_bytes=-1) -> ()");
  m.def("fault(int fa, bool look=False) -> int[]");
  m.def("clear(int fa) -> ()");
  m.def("probe_send(int fa) -> ()");
  m.def("probe_missing(int fa) -> int[]");
}

// The same sum with its effect declared: `state` belongs to the communicator, and every call changes it.
ABIDING_SCHEMAS(abiding, all_reduce, m) {
  m.def("all_reduce(Tensor input, Tensor! state, int comm) -> Tensor");
  m.def("all_reduce.out(Tensor input, Tensor! state, int comm, *, Tensor! out) -> ()");
}
