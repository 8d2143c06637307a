// The group's operators over a backend, CpuScope or CudaScope: check, find the communicator, run. Both backends
// register these.
#pragma once

#include "all_reduce/ops.h"
#include "common/registration.h"
#include "peer/fault.h"

namespace abiding::all_reduce {

template <class Scope>
struct Operators {
  static void run(const char* op, const char* argument, int64_t handle, const char* name, const Tensor& input,
                  const Tensor& out) {
    AllReduceParams p = check_message(op, name, input, out);
    const Scope scope(input);
    peer::with_communicator(op, argument, handle, name, input, [&](const peer::Communicator& communicator) {
      if (p.numel == 0) return;
      p.algorithm = choose_algorithm(communicator.ranks, p.numel * size_of(p.dtype), communicator.one_shot_bytes);
      scope.run(p, communicator.peers({peer::Op::kAllReduce, p.dtype, p.numel}));
    });
  }

  static void all_reduce_raw(int64_t fa, const Tensor& inp, const Tensor& out, int64_t reg_buffer,
                             int64_t reg_buffer_sz_bytes) {
    const int64_t bytes = inp.numel() * static_cast<int64_t>(inp.element_size());
    check(reg_buffer == 0 || bytes <= reg_buffer_sz_bytes, "all_reduce", "inp has ", bytes, " bytes; expected at most ",
          reg_buffer_sz_bytes, ", what reg_buffer_sz_bytes says");
    run("all_reduce", "fa", fa, "inp", inp, out);  // as upstream's, out may have another shape
  }

  static void all_reduce_out(const Tensor& input, const Tensor& state, int64_t comm, const Tensor& out) {
    const Argument in{"all_reduce", "input", input}, result{"all_reduce", "out", out};
    Argument("all_reduce", "state", state).same_device(in);
    check(input.sizes().equals(out.sizes()), "all_reduce", "out has shape ", result.shape(), "; expected ", in.shape(),
          " as input");
    run("all_reduce", "comm", comm, "input", input, out);
  }

  static Tensor all_reduce(const Tensor& input, const Tensor& state, int64_t comm) {
    // Checked before the output is made: overlapping strides can span any amount of memory.
    Argument("all_reduce", "input", input).dense();
    Tensor out = new_empty_strided("all_reduce", input, input.sizes(), input.strides());
    all_reduce_out(input, state, comm, out);
    return out;
  }

  static void implement_raw(Library& m) { m.impl("all_reduce", ABIDING_BOX(all_reduce_raw)); }
  static void implement(Library& m) {
    m.impl("all_reduce", ABIDING_BOX(all_reduce));
    m.impl("all_reduce.out", ABIDING_BOX(all_reduce_out));
  }
};

}  // namespace abiding::all_reduce
