// The contract of the group's operators: every argument is checked here, once, for both backends.
#pragma once

#include <optional>

#include "common/check.h"
#include "mxfp8_moe/params.h"

namespace abiding::mxfp8_moe {

constexpr const char* kExpertsQuant = "mxfp8_experts_quant";
constexpr const char* kRawGroupedMm = "cutlass_mxfp8_grouped_mm";
constexpr const char* kQuantize = "mxfp8_quantize";
constexpr const char* kRebase = "mxfp8_rebase";
constexpr const char* kRound = "mxfp8_round";
constexpr const char* kGroupedMm = "mxfp8_grouped_mm";
constexpr const char* kImplementation = "mxfp8_implementation";
constexpr const char* kMoe = "mxfp8_moe";
constexpr const char* kWorkspaceBytes = "mxfp8_moe_workspace_bytes";

constexpr int64_t kMaxGlobalExperts = 1 << 20;  // of all ranks
constexpr int64_t kMaxRows = 1LL << 31;         // of one call: offsets are 32-bit
constexpr int64_t kMaxWidth = 1LL << 24;        // elements per row
constexpr uintptr_t kAlignment = 16;            // bytes: rows and scales move as 16-byte vectors
constexpr int64_t kWorkspaceAlignment = 256;    // bytes, of each buffer in a workspace

inline bool is_width(int64_t k) { return k >= kScaleBlock && k <= kMaxWidth && k % kScaleBlock == 0; }

inline void check_width(const char* op, const char* name, int64_t k, const char* of) {
  check(is_width(k), op, name, " is ", k, of, "; expected a multiple of ", kScaleBlock, " from ", kScaleBlock, " to ",
        kMaxWidth);
}

inline int64_t row_stride(const Tensor& rows) { return rows.size(0) > 1 ? rows.stride(0) : rows.size(1); }

// Rows [rows, k] of whole scale blocks, read or written in place.
inline const Argument& check_rows(const char* op, const Argument& rows, std::initializer_list<DType> dtypes) {
  const Tensor& tensor = rows.dtype(dtypes).rank(2).tensor();
  check(is_width(tensor.size(1)), op, rows.name(), " has shape ", rows.shape(), "; expected rows of a multiple of ",
        kScaleBlock, " elements, from ", kScaleBlock, " to ", kMaxWidth);
  check(tensor.size(0) < kMaxRows, op, rows.name(), " has shape ", rows.shape(), "; expected fewer than 2^31 rows");
  return rows.dense_rows(static_cast<int64_t>(kAlignment / tensor.element_size())).aligned(kAlignment);
}

inline const Argument& check_result(const char* op, const Argument& rows, std::initializer_list<DType> dtypes,
                                    int64_t height, int64_t width, const Argument& as) {
  rows.same_device(as).rank(2).size(0, height, " as ", as.name()).size(1, width);
  return check_rows(op, rows, dtypes).no_overlap();
}

// Output and input must not overlap. Disjoint columns of one buffer may: same stride, rows that leave room for both.
inline void check_apart(const char* op, const Argument& out, const Argument& input) {
  const Tensor &to = out.tensor(), &from = input.tensor();
  if (to.numel() == 0 || from.numel() == 0) return;
  struct Extent {
    uintptr_t begin, end;
    int64_t stride, width;
  };
  const auto extent = [](const Tensor& t) {
    const auto size = static_cast<int64_t>(t.element_size()), width = t.size(1) * size, stride = row_stride(t) * size;
    const auto begin = reinterpret_cast<uintptr_t>(t.data_ptr());
    return Extent{begin, begin + static_cast<uintptr_t>((t.size(0) - 1) * stride + width), stride, width};
  };
  const Extent a = extent(to), b = extent(from);
  if (a.end <= b.begin || b.end <= a.begin) return;
  const int64_t gap = a.stride > 0 ? static_cast<int64_t>(b.begin - a.begin) % a.stride : 0;
  const int64_t ahead = gap < 0 ? gap + a.stride : gap;
  check(a.stride == b.stride && ahead >= a.width && ahead + b.width <= a.stride, op, out.name(), " overlaps ",
        input.name(), "; expected memory of its own");
}

// The memory from a tensor's first element to its last one, gaps included.
struct MemoryExtent {
  uintptr_t begin, end;

  explicit MemoryExtent(const Tensor& t) : begin(reinterpret_cast<uintptr_t>(t.data_ptr())), end(begin) {
    if (t.numel() == 0) return;
    int64_t last = 0;
    for (int64_t d = 0; d < t.dim(); ++d) last += (t.size(d) - 1) * t.stride(d);
    end += static_cast<uintptr_t>((last + 1) * static_cast<int64_t>(t.element_size()));
  }
  bool overlaps(const MemoryExtent& other) const {
    return begin < end && other.begin < other.end && begin < other.end && other.begin < end;
  }
};

// A workspace is written while every other tensor is in use: what routes rows must not change under the kernels' hands.
inline void check_memory_of_its_own(const Argument& workspace, const char* op,
                                    std::initializer_list<const Argument*> others) {
  const MemoryExtent extent(workspace.tensor());
  for (const Argument* other : others)
    check(!extent.overlaps(MemoryExtent(other->tensor())), op, workspace.name(), " overlaps ", other->name(),
          "; expected memory of its own");
}

// Scale codes in tiles: any shape over memory without gaps is accepted, since the layout is not a tensor's.
inline uint8_t* check_scales(const Argument& scales, const Argument& device, const char* op) {
  const Tensor& tensor = scales.dtype({DType::kUint8}).same_device(device).tensor();
  int64_t last = 0;
  for (int64_t d = 0; d < tensor.dim(); ++d) last += (tensor.size(d) - 1) * tensor.stride(d);
  check(tensor.numel() == 0 || last == tensor.numel() - 1, op, scales.name(), " has shape ", scales.shape(),
        " and strides ", scales.strides(), "; expected memory without gaps or overlaps, as ", scales.name(),
        ".contiguous() has");
  return static_cast<uint8_t*>(scales.aligned(kAlignment).tensor().data_ptr());
}

// The buffer of activation scales: as many whole tiles as the tensor has.
inline ScaleBuffer scale_buffer(const Tensor& scales, int64_t k) {
  const int64_t columns = scale_columns(k);
  return {scales.numel() / columns / kScaleTileRows * kScaleTileRows, columns};
}

inline const int32_t* check_offsets(const Argument& offsets, const Argument& device) {
  return static_cast<const int32_t*>(
      offsets.dtype({DType::kInt32}).rank(1).contiguous().same_device(device).tensor().const_data_ptr());
}

// The public API's offsets in one of two forms, or none.
inline Groups check_groups(const char* op, const Argument& rows, const std::optional<Tensor>& offsets, bool ends) {
  Groups groups{};
  groups.rows = rows.tensor().size(0);
  if (!offsets) {
    groups.count = 1;
    groups.form = OffsetForm::kWhole;
    return groups;
  }
  const Argument argument{op, "offsets", *offsets};
  groups.form = ends ? OffsetForm::kEnds : OffsetForm::kStarts;
  groups.offsets = check_offsets(argument, rows);
  groups.count = offsets->size(0) - (ends ? 0 : 1);
  check(1 <= groups.count && groups.count <= kMaxExperts, op, "offsets has shape ", argument.shape(),
        "; expected 1 to ", kMaxExperts, ends ? " groups, an end for each" : " groups, a start for each and the total");
  return groups;
}

// The raw operators' form: first rows, (m, n, k), and each group's first row among the scales.
inline Groups check_problems(const char* op, const Argument& rows, const Tensor& problem_sizes,
                             const Tensor& expert_offsets, const Tensor& blockscale_offsets) {
  const Argument problems{op, "problem_sizes", problem_sizes}, starts{op, "expert_offsets", expert_offsets},
      scale_starts{op, "blockscale_offsets", blockscale_offsets};
  problems.dtype({DType::kInt32}).rank(2).size(1, 3).contiguous().same_device(rows);
  Groups groups{};
  groups.count = problem_sizes.size(0);
  groups.rows = rows.tensor().size(0);
  groups.form = OffsetForm::kProblems;
  groups.offsets = check_offsets(starts, rows);
  groups.problem_sizes = static_cast<const int32_t*>(problem_sizes.const_data_ptr());
  groups.scale_offsets = check_offsets(scale_starts, rows);
  check(1 <= groups.count && groups.count <= kMaxExperts, op, "problem_sizes has shape ", problems.shape(),
        "; expected 1 to ", kMaxExperts, " groups");
  starts.size(0, groups.count, ", the groups of problem_sizes");
  scale_starts.size(0, groups.count, ", the groups of problem_sizes");
  return groups;
}

// Weights [count, n, k], or [count, k, n] as n_dim and k_dim say. Rows of k elements are dense; other strides are free.
struct Weight {
  const uint8_t *data, *scales;
  int64_t n, k, expert_stride, stride;
};

inline Weight check_weight(const char* op, const Argument& weight, const Argument& scales, int64_t count, int n_dim,
                           int k_dim, const Argument& device) {
  const Tensor& tensor = weight.dtype({DType::kFloat8E4m3, DType::kUint8})
                             .rank(3)
                             .size(0, count, ", the number of experts")
                             .same_device(device)
                             .aligned(kAlignment)
                             .tensor();
  const int64_t n = tensor.size(n_dim), k = tensor.size(k_dim);
  check(is_width(n) && is_width(k), op, weight.name(), " has shape ", weight.shape(),
        "; expected inner sizes that are multiples of ", kScaleBlock, ", from ", kScaleBlock, " to ", kMaxWidth);
  const auto step = static_cast<int64_t>(kAlignment);
  const bool aligned = tensor.stride(n_dim) % step == 0 && (count == 1 || tensor.stride(0) % step == 0);
  check(tensor.stride(k_dim) == 1 && aligned, op, weight.name(), " has strides ", weight.strides(),
        "; expected stride 1 in dimension ", k_dim, " and multiples of ", step, " in the others");
  const uint8_t* codes = check_scales(scales, device, op);
  const int64_t bytes = count * round_up(n, kScaleTileRows) * scale_columns(k);
  check(scales.tensor().numel() == bytes, op, scales.name(), " has shape ", scales.shape(), "; expected ", count, " x ",
        round_up(n, kScaleTileRows), " x ", scale_columns(k), " bytes for ", n, " rows of ", k);
  Weight result{};
  result.data = static_cast<const uint8_t*>(tensor.const_data_ptr());
  result.scales = codes;
  result.n = n;
  result.k = k;
  result.expert_stride = count > 1 ? tensor.stride(0) : n * tensor.stride(n_dim);
  result.stride = tensor.stride(n_dim);
  return result;
}

// An output of rebase is the input itself, for a rebase in place, or memory of its own.
inline void check_same_or_apart(const char* op, const Argument& out, const Argument& input) {
  const MemoryExtent to(out.tensor()), from(input.tensor());
  bool same = to.begin == from.begin && out.tensor().dim() == input.tensor().dim();
  for (int64_t d = 0; same && d < out.tensor().dim(); ++d)
    same = out.tensor().size(d) == input.tensor().size(d) && out.tensor().stride(d) == input.tensor().stride(d);
  check(same || !to.overlaps(from), op, out.name(), " overlaps ", input.name(),
        "; expected that tensor itself, or memory of its own");
}

inline RebaseParams check_rebase(const Tensor& weight, const Tensor& weight_scales, const Tensor& out,
                                 const Tensor& out_scales, const Tensor& counts, const Tensor& errors) {
  const char* op = kRebase;
  const Argument from{op, "weight", weight}, from_scales{op, "weight_scales", weight_scales}, to{op, "out", out},
      to_scales{op, "out_scales", out_scales}, count{op, "counts", counts}, error{op, "errors", errors};
  from.rank(3);
  const int64_t experts = weight.size(0);
  check(experts <= kMaxExperts, op, "weight has shape ", from.shape(), "; expected up to ", kMaxExperts, " experts");
  const Weight source = check_weight(op, from, from_scales, experts, 1, 2, from);
  to.rank(3).size(1, source.n, " as weight").size(2, source.k, " as weight");
  const Weight result = check_weight(op, to, to_scales, experts, 1, 2, from);
  to.no_overlap();
  check_same_or_apart(op, to, from);
  check_same_or_apart(op, to_scales, from_scales);
  RebaseParams p{};
  p.experts = experts;
  p.n = source.n;
  p.k = source.k;
  p.weight = source.data;
  p.expert_stride = source.expert_stride;
  p.stride = source.stride;
  p.scales = source.scales;
  p.out = static_cast<uint8_t*>(out.mutable_data_ptr());
  p.out_expert_stride = result.expert_stride;
  p.out_stride = result.stride;
  p.out_scales = static_cast<uint8_t*>(out_scales.mutable_data_ptr());
  const auto written = [&](const Argument& argument, DType dtype, int64_t size) {
    return argument.dtype({dtype}).rank(1).size(0, size).contiguous().same_device(from).tensor().mutable_data_ptr();
  };
  p.counts = static_cast<int64_t*>(written(count, DType::kInt64, 3));
  p.errors = static_cast<double*>(written(error, DType::kFloat64, 2));
  return p;
}

inline QuantizeParams check_quantize(const char* op, const Argument& input, const Argument& data,
                                     const Argument& scales, const Groups& groups) {
  const int64_t k = input.tensor().size(1);
  check_result(op, data, {DType::kFloat8E4m3, DType::kUint8}, groups.rows, k, input);
  check_apart(op, data, input);
  QuantizeParams p{};
  p.scales = check_scales(scales, input, op);
  p.groups = groups;
  p.scale_buffer = scale_buffer(scales.tensor(), k);
  p.k = k;
  p.input = input.tensor().const_data_ptr();
  p.input_stride = row_stride(input.tensor());
  p.dtype = input.dtype();
  p.data = static_cast<uint8_t*>(data.tensor().mutable_data_ptr());
  p.data_stride = row_stride(data.tensor());
  return p;
}

inline QuantizeParams check_quantize(const Tensor& input, const std::optional<Tensor>& offsets, bool ends, bool rowwise,
                                     const Tensor& data, const Tensor& scales) {
  const Argument rows{kQuantize, "input", input};
  check_rows(kQuantize, rows, {DType::kBfloat16, DType::kFloat16});
  QuantizeParams p = check_quantize(kQuantize, rows, {kQuantize, "data", data}, {kQuantize, "scales", scales},
                                    check_groups(kQuantize, rows, offsets, ends));
  p.rowwise = rowwise;
  p.clear_rest = true;
  return p;
}

inline QuantizeParams check_experts_quant(const Tensor& input, const Tensor& problem_sizes,
                                          const Tensor& expert_offsets, const Tensor& blockscale_offsets,
                                          const Tensor& quant_output, const Tensor& scale_factor) {
  const char* op = kExpertsQuant;
  const Argument rows{op, "input", input};
  check_rows(op, rows, {DType::kBfloat16, DType::kFloat16});
  return check_quantize(op, rows, {op, "quant_output", quant_output}, {op, "scale_factor", scale_factor},
                        check_problems(op, rows, problem_sizes, expert_offsets, blockscale_offsets));
}

inline RoundParams check_round(const Tensor& input, const Tensor& out) {
  const Argument rows{kRound, "input", input}, result{kRound, "out", out};
  check_rows(kRound, rows, {DType::kBfloat16, DType::kFloat16});
  check_result(kRound, result, {DType::kBfloat16}, input.size(0), input.size(1), rows);
  check_apart(kRound, result, rows);
  RoundParams p{};
  p.rows = input.size(0);
  p.k = input.size(1);
  p.input = input.const_data_ptr();
  p.input_stride = row_stride(input);
  p.dtype = rows.dtype();
  p.out = out.mutable_data_ptr();
  p.out_stride = row_stride(out);
  return p;
}

inline Compute check_compute(const char* op, int64_t compute) {
  check(0 <= compute && compute <= 1, op, "compute is ", compute, "; expected 0 (exact) or 1 (fp8)");
  return static_cast<Compute>(compute);
}

// A grouped GEMM, and where its rows are e4m3 the step before it, for which the caller has memory: `dequantize` makes
// bf16 of them, or `row_scales` makes their scales.
struct GroupedMm {
  Compute compute;
  GroupedMmParams gemm;
  DequantizeParams dequantize;
  RowScalesParams row_scales;
  bool quantized;
};

// What a GEMM knows from its weights; dense bf16 rows unless the caller says otherwise.
inline GroupedMmParams gemm_params(const Groups& groups, const Weight& weight) {
  GroupedMmParams p{};
  p.groups = groups;
  p.n = weight.n;
  p.k = weight.k;
  p.a_stride = weight.k;
  p.weight = weight.data;
  p.weight_expert_stride = weight.expert_stride;
  p.weight_stride = weight.stride;
  p.weight_scales = weight.scales;
  p.out_stride = weight.n;
  p.out_dtype = DType::kBfloat16;
  p.expected_rows = groups.rows;
  return p;
}

inline GroupedMm check_gemm(const char* op, const Argument& a, const std::optional<Argument>& a_scales,
                            const Groups& groups, const Weight& weight, Compute compute, const Argument& out,
                            std::initializer_list<DType> out_dtypes) {
  const int64_t k = a.tensor().size(1);
  check(weight.k == k, op, a.name(), " has shape ", a.shape(), "; expected rows of ", weight.k,
        " elements, as the weights have");
  check_result(op, out, out_dtypes, groups.rows, weight.n, a);
  check_apart(op, out, a);
  GroupedMm mm{};
  mm.compute = compute;
  mm.quantized = a_scales.has_value();
  mm.gemm = gemm_params(groups, weight);
  mm.gemm.a = a.tensor().const_data_ptr();
  mm.gemm.a_stride = row_stride(a.tensor());
  mm.gemm.out = out.tensor().mutable_data_ptr();
  mm.gemm.out_stride = row_stride(out.tensor());
  mm.gemm.out_dtype = out.dtype();
  mm.gemm.inputs_ready_before_pdl = mm.quantized;  // the step before it runs between what wrote them and this
  if (!mm.quantized) return mm;
  mm.dequantize.groups = groups;
  mm.dequantize.scale_buffer = scale_buffer(a_scales->tensor(), k);
  mm.dequantize.k = k;
  mm.dequantize.data = static_cast<const uint8_t*>(a.tensor().const_data_ptr());
  mm.dequantize.data_stride = row_stride(a.tensor());
  mm.dequantize.scales = check_scales(*a_scales, a, op);
  mm.dequantize.out_stride = k;
  mm.row_scales.groups = groups;
  mm.row_scales.scale_buffer = mm.dequantize.scale_buffer;
  mm.row_scales.k = k;
  mm.row_scales.scales = mm.dequantize.scales;
  return mm;
}

inline GroupedMm check_grouped_mm(const Tensor& a, const std::optional<Tensor>& a_scales, const Tensor& weight,
                                  const Tensor& weight_scales, const std::optional<Tensor>& offsets, bool ends,
                                  int64_t compute, const Tensor& out) {
  const char* op = kGroupedMm;
  const Argument rows{op, "a", a};
  const Compute how = check_compute(op, compute);
  check(a_scales || how == Compute::kExact, op, "a_scales is None; expected scales where compute is 1 (fp8)");
  if (a_scales)
    check_rows(op, rows, {DType::kFloat8E4m3, DType::kUint8});
  else
    check_rows(op, rows, {DType::kBfloat16});
  const Groups groups = check_groups(op, rows, offsets, ends);
  const Weight experts =
      check_weight(op, {op, "weight", weight}, {op, "weight_scales", weight_scales}, groups.count, 1, 2, rows);
  const auto scales = a_scales ? std::optional<Argument>({op, "a_scales", *a_scales}) : std::nullopt;
  return check_gemm(op, rows, scales, groups, experts, how, {op, "out", out},
                    {DType::kBfloat16, DType::kFloat16, DType::kFloat32});
}

inline GroupedMm check_raw_grouped_mm(const Tensor& a, const Tensor& b, const Tensor& sfa, const Tensor& sfb,
                                      const Tensor& out, const Tensor& problem_sizes, const Tensor& expert_offsets,
                                      const Tensor& blockscale_offsets) {
  const char* op = kRawGroupedMm;
  const Argument rows{op, "a", a}, scales{op, "sfa", sfa};
  check_rows(op, rows, {DType::kFloat8E4m3, DType::kUint8});
  const Groups groups = check_problems(op, rows, problem_sizes, expert_offsets, blockscale_offsets);
  const Weight experts = check_weight(op, {op, "b", b}, {op, "sfb", sfb}, groups.count, 2, 1, rows);
  return check_gemm(op, rows, scales, groups, experts, Compute::kExact, {op, "out", out},
                    {DType::kBfloat16, DType::kFloat16});
}

// GEMMs of dense tensors, for the question which implementation they get.
inline std::vector<GroupedMmParams> check_implementation(int64_t rows, int64_t experts, const std::vector<int64_t>& n,
                                                         const std::vector<int64_t>& k, Compute compute) {
  const char* op = kImplementation;
  check(0 <= rows && rows < kMaxRows, op, "rows is ", rows, "; expected fewer than 2^31");
  check(1 <= experts && experts <= kMaxExperts, op, "experts is ", experts, "; expected 1 to ", kMaxExperts);
  check(!n.empty() && n.size() == k.size(), op, "n and k have ", n.size(), " and ", k.size(),
        " numbers; expected one of each per GEMM");
  std::vector<GroupedMmParams> gemms;
  for (size_t i = 0; i < n.size(); ++i) {
    check_width(op, "n", n[i], "");
    check_width(op, "k", k[i], "");
    Weight weight{};
    weight.n = n[i];
    weight.k = weight.stride = k[i];
    weight.expert_stride = n[i] * k[i];
    Groups groups{};
    groups.count = experts;
    groups.rows = rows;
    GroupedMmParams& p = gemms.emplace_back(gemm_params(groups, weight));
    static const float any_scale = 1;
    if (compute == Compute::kFp8) p.a_scales = &any_scale;
  }
  return gemms;
}

// Offsets of a layer's buffers in its workspace, in bytes; sized for the case that every token-expert pair is local.
struct Workspace {
  int64_t offsets, pair_rows;
  int64_t gathered;  // rows of the first GEMM, and then of combine: they are used up by the time the second GEMM writes
  int64_t gate_up_out;  // the first GEMM's result
  int64_t activated;    // rows of the second GEMM
  int64_t bytes;        // of all
};

inline Workspace workspace_layout(int64_t tokens, int64_t top_k, int64_t experts, int64_t hidden,
                                  int64_t intermediate) {
  const int64_t pairs = tokens * top_k;
  int64_t at = 0;
  const auto allocate = [&at](int64_t bytes) {
    const int64_t begin = at;
    at += round_up(bytes, kWorkspaceAlignment);
    return begin;
  };
  Workspace layout{};
  layout.offsets = allocate((experts + 1) * 4);
  layout.pair_rows = allocate(pairs * 4);
  layout.activated = allocate(pairs * intermediate * 2);
  layout.gathered = allocate(pairs * hidden * 2);
  layout.gate_up_out = allocate(pairs * intermediate * 2 * 2);
  layout.bytes = at;
  return layout;
}

inline void check_pairs(const char* op, int64_t tokens, int64_t top_k, int64_t experts) {
  check(1 <= top_k && top_k <= kMaxTopK, op, "top_k is ", top_k, "; expected 1 to ", kMaxTopK);
  check(0 <= tokens && tokens * top_k < kMaxRows, op, "tokens is ", tokens,
        "; expected 0 or more, and fewer than 2^31 pairs with the ", top_k, " experts of a token");
  check(0 <= experts && experts <= kMaxExperts, op, "experts is ", experts, "; expected 0 to ", kMaxExperts);
}

inline int64_t check_workspace_bytes(int64_t tokens, int64_t top_k, int64_t experts, int64_t hidden,
                                     int64_t intermediate) {
  check(0 <= tokens && tokens < kMaxRows, kWorkspaceBytes, "tokens is ", tokens,
        "; expected 0 or more, and fewer than 2^31");
  check_pairs(kWorkspaceBytes, tokens, top_k, experts);
  check_width(kWorkspaceBytes, "hidden", hidden, "");
  check_width(kWorkspaceBytes, "intermediate", intermediate, "");
  return workspace_layout(tokens, top_k, experts, hidden, intermediate).bytes;
}

// A layer's six steps; gate_up and down are its two GEMMs. place() binds the steps to a workspace.
struct Moe {
  Compute compute;
  RouteParams route;
  GatherParams gather;
  GroupedMmParams gate_up;
  ActivateParams activate;
  GroupedMmParams down;
  CombineParams combine;
  Workspace layout;

  void place(void* workspace) {
    char* base = static_cast<char*>(workspace);
    route.offsets = reinterpret_cast<int32_t*>(base + layout.offsets);
    route.pair_rows = reinterpret_cast<int32_t*>(base + layout.pair_rows);
    gather.pair_rows = combine.pair_rows = route.pair_rows;
    gate_up.groups.offsets = down.groups.offsets = route.offsets;
    activate.used_rows = route.offsets + route.experts;
    activate.input = gate_up.out = base + layout.gate_up_out;
    combine.input = down.out = base + layout.gathered;
    place_rows(gather.out, gate_up, base + layout.gathered);
    place_rows(activate.out, down, base + layout.activated);
  }
  // After place(): rows as the implementation of the GEMMs reads them.
  void set_format(RowFormat format) {
    for (auto [rows, gemm] : {std::pair(&gather.out, &gate_up), std::pair(&activate.out, &down)}) {
      rows->format = format;
      gemm->interleaved = format == RowFormat::kBf16Interleaved;
      if (format != RowFormat::kE4m3) gemm->a_scales = nullptr;
    }
  }

 private:
  // A region has room for bf16 rows. e4m3 rows take half of it, and their scales fit behind them: 4 bytes for at least
  // 32 elements.
  void place_rows(GemmRows& rows, GroupedMmParams& gemm, char* region) const {
    rows.data = region;
    gemm.a = region;
    if (compute != Compute::kFp8) return;
    rows.scales = reinterpret_cast<float*>(region + gemm.groups.rows * gemm.k);
    gemm.a_scales = rows.scales;
  }
};

inline Moe check_moe(const Tensor& x, const Tensor& w13, const Tensor& s13, const Tensor& w2, const Tensor& s2,
                     const Tensor& topk_ids, const Tensor& topk_weights, int64_t activation, bool w8a8,
                     const std::optional<Tensor>& workspace, int64_t compute, const Tensor& out) {
  const char* op = kMoe;
  const Argument rows{op, "x", x}, gate_up{op, "w13", w13}, down{op, "w2", w2}, ids{op, "topk_ids", topk_ids},
      weights{op, "topk_weights", topk_weights}, result{op, "out", out};
  check_rows(op, rows, {DType::kBfloat16});
  const Compute how = check_compute(op, compute);
  check(w8a8 || how == Compute::kExact, op, "w8a8 is false; expected true where compute is 1 (fp8)");
  check(0 <= activation && activation <= 2, op, "activation is ", activation, "; expected 0, 1 or 2");
  gate_up.rank(3);
  const int64_t tokens = x.size(0), hidden = x.size(1), experts = w13.size(0);
  check(experts <= kMaxExperts, op, "w13 has shape ", gate_up.shape(), "; expected up to ", kMaxExperts, " experts");
  const Weight first = check_weight(op, gate_up, {op, "s13", s13}, experts, 1, 2, rows);
  const Weight second = check_weight(op, down, {op, "s2", s2}, experts, 1, 2, rows);
  const auto kind = static_cast<Activation>(activation);
  const int64_t intermediate = second.k;
  gate_up.size(2, hidden, ", the columns of x");
  gate_up.size(1, kind == Activation::kNone ? intermediate : 2 * intermediate,
               kind == Activation::kNone ? ", the columns of w2" : ", twice the columns of w2");
  down.size(1, hidden, ", the columns of x");

  ids.dtype({DType::kInt32, DType::kInt64}).rank(2).contiguous().same_device(rows);
  ids.size(0, tokens, ", the rows of x");
  const int64_t top_k = topk_ids.size(1);
  check(1 <= top_k && top_k <= kMaxTopK, op, "topk_ids has shape ", ids.shape(), "; expected 1 to ", kMaxTopK,
        " experts for a token");
  check(tokens * top_k < kMaxRows, op, "topk_ids has shape ", ids.shape(), "; expected fewer than 2^31 pairs");
  weights.dtype({DType::kFloat32}).rank(2).size(0, tokens, ", the rows of x").size(1, top_k, " as topk_ids");
  weights.dense_rows(1).same_device(rows);
  check_result(op, result, {DType::kBfloat16}, tokens, hidden, rows);
  check_apart(op, result, rows);

  Moe moe{};
  moe.compute = how;
  moe.layout = workspace_layout(tokens, top_k, experts, hidden, intermediate);
  if (workspace) {
    const Argument space{op, "workspace", *workspace};
    space.dtype({DType::kUint8}).rank(1).contiguous().aligned_on_cpu_too(kAlignment).same_device(rows);
    check(workspace->size(0) >= moe.layout.bytes, op, "workspace has shape ", space.shape(), "; expected at least [",
          moe.layout.bytes, "] for ", tokens, " tokens, as mxfp8_moe_workspace_bytes says");
    const Argument first_scales{op, "s13", s13}, second_scales{op, "s2", s2};
    check_memory_of_its_own(space, op,
                            {&rows, &gate_up, &first_scales, &down, &second_scales, &ids, &weights, &result});
  }
  const int64_t pairs = tokens * top_k;
  Groups groups{};
  groups.count = experts;
  groups.rows = pairs;
  groups.form = OffsetForm::kStarts;
  moe.route.ids = {topk_ids.const_data_ptr(), pairs, ids.dtype() == DType::kInt64};
  moe.route.tokens = tokens;
  moe.route.top_k = top_k;
  moe.route.experts = experts;
  moe.gather.tokens = tokens;
  moe.gather.top_k = top_k;
  moe.gather.hidden = hidden;
  moe.gather.x = x.const_data_ptr();
  moe.gather.x_stride = row_stride(x);
  moe.gather.out.round = moe.activate.out.round = w8a8;
  moe.gather.out.rowwise = moe.activate.out.rowwise = how == Compute::kFp8;
  moe.gate_up = gemm_params(groups, first);
  moe.activate.max_rows = pairs;
  moe.activate.intermediate = intermediate;
  moe.activate.activation = kind;
  moe.down = gemm_params(groups, second);
  moe.gate_up.inputs_ready_before_pdl = moe.down.inputs_ready_before_pdl = true;
  moe.combine.tokens = tokens;
  moe.combine.top_k = top_k;
  moe.combine.hidden = hidden;
  moe.combine.weights = static_cast<const float*>(topk_weights.const_data_ptr());
  moe.combine.weights_stride = row_stride(topk_weights);
  moe.combine.out = out.mutable_data_ptr();
  moe.combine.out_stride = row_stride(out);
  return moe;
}

// The operator's activations: 0 silu, 1 swiglu_oai, 2 none. silu with a limit is kSwiglu with alpha 1 and beta 0.
inline void set_activation(ActivateParams& p, double alpha, double beta, const std::optional<double>& limit) {
  const char* op = kMoe;
  constexpr double kAlpha = 1.702, kBeta = 1.0, kLimit = 7.0;  // of swiglu_oai
  const bool is_oai = p.activation == Activation::kSwiglu;
  const auto to_float = [](double x) { return static_cast<float>(x); };
  check(is_oai || alpha == kAlpha, op, "swiglu_alpha is ", alpha, "; expected the default ", kAlpha,
        " where the activation is not swiglu_oai");
  check(is_oai || beta == kBeta, op, "swiglu_beta is ", beta, "; expected the default ", kBeta,
        " where the activation is not swiglu_oai");
  check(std::isfinite(to_float(alpha)) && to_float(alpha) > 0, op, "swiglu_alpha is ", alpha,
        "; expected a positive, finite number");
  check(std::isfinite(to_float(beta)), op, "swiglu_beta is ", beta, "; expected a finite number");
  if (limit) {
    check(p.activation != Activation::kNone, op, "swiglu_limit is ", *limit,
          "; expected None where the activation is none");
    check(to_float(*limit) > 0, op, "swiglu_limit is ", *limit, "; expected a positive number");
  }
  if (is_oai) {
    p.swiglu = {to_float(alpha), to_float(beta), to_float(limit.value_or(kLimit))};
  } else if (limit && std::isfinite(to_float(*limit))) {
    p.activation = Activation::kSwiglu;
    p.swiglu = {1.0f, 0.0f, to_float(*limit)};
  }
}

// Expert parallelism: where ids lead, and how many of the token-expert pairs are expected here.
inline void set_expert_parallel(Moe& moe, const Argument& x, const std::optional<Tensor>& expert_map,
                                const std::optional<int64_t>& global_experts) {
  const char* op = kMoe;
  const int64_t experts = moe.route.experts;
  int64_t global = global_experts.value_or(experts);
  if (expert_map) {
    const Argument map{op, "expert_map", *expert_map};
    map.dtype({DType::kInt32}).rank(1).contiguous().same_device(x);
    const int64_t size = expert_map->size(0);
    check(1 <= size && size <= kMaxGlobalExperts, op, "expert_map has shape ", map.shape(), "; expected 1 to ",
          kMaxGlobalExperts, " experts");
    check(!global_experts || global == size, op, "global_experts is ", global, "; expected ", size,
          ", the length of expert_map, or None");
    moe.route.expert_map = static_cast<const int32_t*>(expert_map->const_data_ptr());
    moe.route.global_experts = global = size;
  }
  check(expert_map || (experts <= global && global <= kMaxGlobalExperts), op, "global_experts is ", global,
        "; expected ", experts, ", the experts of w13, to ", kMaxGlobalExperts);
  if (experts >= global) return;
  const int64_t pairs = moe.route.tokens * moe.route.top_k;
  moe.gate_up.expected_rows = moe.down.expected_rows = (pairs * experts + global - 1) / global;
}

// What ABIDING_CHECK_INDICES=1 adds. A negative expert id is an expert elsewhere; offsets must lie inside the tensors.
inline IndexRule expert_rule(const RouteParams& p) {
  return {"topk_ids", p.ids, INT64_MIN, p.expert_map ? p.global_experts : p.experts};
}
inline IndexRule expert_map_rule(const RouteParams& p) {
  return {"expert_map", {p.expert_map, p.expert_map ? p.global_experts : 0, false}, INT64_MIN, p.experts};
}
inline IndexRule offset_rule(const Groups& groups) {
  const bool raw = groups.form == OffsetForm::kProblems;
  const int64_t size = groups.form == OffsetForm::kWhole ? 0 : groups.count + (groups.form == OffsetForm::kStarts);
  return {raw ? "expert_offsets" : "offsets", {groups.offsets, size, false}, 0, groups.rows + 1};
}
inline IndexRule scale_offset_rule(const Groups& groups, const ScaleBuffer& scales) {
  const int64_t size = groups.form == OffsetForm::kProblems ? groups.count : 0;
  return {"blockscale_offsets", {groups.scale_offsets, size, false}, 0, scales.rows + 1};
}
// Weights whose codes differ in a row give NaN in Compute::kFp8.
template <class Scope>
void check_row_codes(const char* op, const Scope& scope, const char* scales, const GroupedMmParams& p) {
  if (!index_checks_enabled()) return;
  const int64_t bad = scope.find_bad(RowCodesRule{p.groups.count, p.n, p.k, p.weight_scales}).at;
  check(bad < 0, op, scales, " has several codes in row ", bad % p.n, " of expert ", bad / p.n,
        "; expected one per row, as rebase makes them");
}

}  // namespace abiding::mxfp8_moe
