#include "common/schemas.h"

// With abiding_custom_ar::all_reduce, those of upstream (vLLM's custom all-reduce) keep upstream's schemas, so that an
// engine's own class can drive them.
ABIDING_SCHEMAS(abiding_custom_ar, peer, m) {
  m.def("init_custom_ar(int[] ipc_tensors, Tensor rank_data, int rank, bool fully_connected) -> int");
  m.def("dispose(int fa) -> ()");
  m.def("meta_size() -> int");
  m.def("register_buffer(int fa, int[] ipc_tensors) -> ()");
  m.def("get_graph_buffer_ipc_meta(int fa) -> (int[], int[])");
  m.def("register_graph_buffers(int fa, int[][] handles, int[][] offsets) -> ()");
  m.def("allocate_shared_buffer_and_handle(int size) -> (int, Tensor)");
  m.def("open_mem_handle(Tensor mem_handle) -> int");
  m.def("free_shared_buffer(int ptr) -> ()");

  // Ours.
  m.def("allocate_shared_memory_and_handle(int size) -> (int, Tensor)");
  m.def("close_mem_handle(int ptr) -> ()");
  m.def("announce_closed(int fa) -> ()");
  m.def("announce_interrupted(int fa) -> ()");
  m.def("announce_call(int fa, Tensor message) -> ()");
  m.def("configure(int fa, float timeout_s, int max_blocks, int one_shot_bytes=-1) -> ()");
  m.def("fault(int fa, bool look=False) -> int[]");
  m.def("fault_text(int fa, bool look=False) -> str");
  m.def("clear(int fa) -> ()");
  m.def("probe_send(int fa) -> ()");
  m.def("probe_missing(int fa) -> int[]");
}
