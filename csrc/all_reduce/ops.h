// The contract of the group's operators: every argument is checked here, once, for both backends.
#pragma once

#include "all_reduce/params.h"
#include "common/check.h"

namespace abiding::all_reduce {

inline bool same_layout(const Tensor& a, const Tensor& b) {
  if (a.is_contiguous() && b.is_contiguous()) return a.numel() == b.numel();
  if (!a.sizes().equals(b.sizes())) return false;
  for (int64_t d = 0; d < a.dim(); ++d)
    if (a.size(d) > 1 && a.stride(d) != b.stride(d)) return false;
  return true;
}

// `name` is what the operator calls its input.
inline AllReduceParams check_message(const char* op, const char* name, const Tensor& input, const Tensor& output) {
  const Argument in{op, name, input}, out{op, "out", output};
  in.dtype({DType::kFloat32, DType::kFloat16, DType::kBfloat16});
  out.same_dtype(in).same_device(in);
  in.dense();
  out.dense();
  check(same_layout(input, output), op, "out has shape ", out.shape(), " and strides ", out.strides(), "; expected ",
        in.shape(), " and ", in.strides(), " as ", name);
  const char *from = static_cast<const char*>(input.const_data_ptr()),
             *to = static_cast<const char*>(output.const_data_ptr());
  const int64_t bytes = input.numel() * static_cast<int64_t>(input.element_size());
  check(from == to || from + bytes <= to || to + bytes <= from, op, "out overlaps ", name,
        "; expected memory of its own, or exactly that of ", name);
  AllReduceParams p{};
  p.input = from;
  p.out = output.mutable_data_ptr();
  p.numel = input.numel();
  p.dtype = in.dtype();
  return p;
}

}  // namespace abiding::all_reduce
