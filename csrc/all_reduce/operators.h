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
                  AllReduceParams p) {
    const Scope scope(input);
    peer::with_communicator(op, argument, handle, name, input, [&](const peer::Communicator& communicator) {
      if (p.numel == 0) return;
      p.algorithm = choose_algorithm(communicator.ranks, p.numel * size_of(p.dtype), communicator.one_shot_bytes);
      scope.run(p, communicator.peers({peer::Op::kAllReduce, p.dtype, p.numel}));
    });
  }

  static void all_reduce_raw(int64_t fa, const Tensor& inp, const Tensor& out, int64_t reg_buffer,
                             int64_t reg_buffer_sz_bytes) {
    const AllReduceParams p =
        check_message("all_reduce", "inp", inp, out);  // as upstream's, out may have another shape
    const int64_t bytes = p.numel * size_of(p.dtype);
    check(reg_buffer == 0 || bytes <= reg_buffer_sz_bytes, "all_reduce", "inp has ", bytes, " bytes; expected at most ",
          reg_buffer_sz_bytes, ", what reg_buffer_sz_bytes says");
    check(reg_buffer == 0 || peer::owns(reg_buffer, inp.is_cuda(), reg_buffer_sz_bytes), "all_reduce", "reg_buffer is ",
          reg_buffer, "; expected 0, or the address of ", reg_buffer_sz_bytes,
          " bytes or more that this process has allocated or opened by these operators");
    run("all_reduce", "fa", fa, "inp", inp, p);
  }

  static void all_reduce_out(const Tensor& input, const Tensor& state, int64_t comm, const Tensor& out) {
    const Argument in{"all_reduce", "input", input}, result{"all_reduce", "out", out};
    Argument("all_reduce", "state", state).same_device(in);
    check(input.sizes().equals(out.sizes()), "all_reduce", "out has shape ", result.shape(), "; expected ", in.shape(),
          " as input");
    run("all_reduce", "comm", comm, "input", input, check_message("all_reduce", "input", input, out));
  }

  static Tensor all_reduce(const Tensor& input, const Tensor& state, int64_t comm) {
    // Checked before the output is made: overlapping strides can span any amount of memory.
    const Argument in{"all_reduce", "input", input};
    in.dense();
    const Tensor out = new_empty_strided(in, input.sizes(), input.strides());
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
