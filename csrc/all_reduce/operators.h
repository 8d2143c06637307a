// The group's operators over a backend: find the communicator, check, launch. Both backends register these.
#pragma once

#include "all_reduce/ops.h"
#include "common/registration.h"
#include "peer/fault.h"

namespace abiding::all_reduce {

using peer::Communicator;

// Backend(tensor) makes the tensor's device current and moves a message with all_reduce(communicator, params, algorithm), at
// most capacity(communicator, algorithm) bytes of it. Backend::memory() tells its kind of device.
template <class Backend>
struct Operators {
  static void sum(const char* op, const char* argument, int64_t handle, const char* name, const Tensor& input,
                  const Tensor& out) {
    const Communicator& communicator = peer::find_or_fail(op, argument, handle);
    AllReduceParams p = check_message(op, name, input, out);
    const Backend backend(input);
    check(communicator.memory == Backend::memory(), op, argument, " was made for another kind of device than ", name,
          " is on; expected the same");
    peer::check_running(op, communicator);
    if (p.numel == 0) return;
    const int64_t bytes = p.numel * size_of(p.dtype);
    const Algorithm algorithm = choose_algorithm(communicator.ranks, bytes, communicator.one_shot_bytes);
    const int64_t most = backend.capacity(communicator, algorithm) / size_of(p.dtype);
    for (int64_t done = 0; done < p.numel; done += most) {
      AllReduceParams part = p;
      part.input = static_cast<const char*>(p.input) + done * size_of(p.dtype);
      part.out = static_cast<char*>(p.out) + done * size_of(p.dtype);
      part.numel = std::min(most, p.numel - done);
      backend.all_reduce(communicator, part, algorithm);
    }
    if constexpr (Backend::kBlocking) peer::check_running(op, communicator);
  }

  static void all_reduce_raw(int64_t fa, const Tensor& inp, const Tensor& out, int64_t reg_buffer,
                             int64_t reg_buffer_sz_bytes) {
    const int64_t bytes = inp.numel() * static_cast<int64_t>(inp.element_size());
    check(reg_buffer == 0 || bytes <= reg_buffer_sz_bytes, "all_reduce", "inp has ", bytes, " bytes; expected at most ",
          reg_buffer_sz_bytes, ", what reg_buffer_sz_bytes says");
    sum("all_reduce", "fa", fa, "inp", inp, out);  // as upstream's, out may have another shape
  }

  static void all_reduce_out(const Tensor& input, const Tensor& state, int64_t comm, const Tensor& out) {
    const Argument in{"all_reduce", "input", input}, result{"all_reduce", "out", out};
    Argument("all_reduce", "state", state).same_device(in);
    check(input.sizes().equals(out.sizes()), "all_reduce", "out has shape ", result.shape(), "; expected ", in.shape(),
          " as input");
    sum("all_reduce", "comm", comm, "input", input, out);
  }

  static Tensor all_reduce(const Tensor& input, const Tensor& state, int64_t comm) {
    Argument("all_reduce", "input", input).dense();  // strides of others ask for any amount of memory
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
