// What the checks hand to kernels: plain data, and the MXFP8 format that host and device share. No torch here.
#pragma once

#include <cstdint>

#include "common/dtypes.h"
#include "common/indices.h"
#include "common/numerics.h"

namespace abiding::mxfp8_moe {

constexpr int kScaleBlock = 32;  // consecutive elements of a row that share a scale (OCP Microscaling formats)
constexpr int kMaxExperts = 1024;
constexpr int kMaxTopK = 16;

// Scales are stored in tiles of 128 rows x 4 blocks, 512 bytes: cuBLAS calls the layout VEC32_UE8M0, torch
// SWIZZLE_32_4_4. In a tile, rows r, r + 32, r + 64, r + 96 are adjacent. Tiles run along a row first.
constexpr int kScaleTileRows = 128, kScaleTileBlocks = 4, kScaleTileBytes = kScaleTileRows * kScaleTileBlocks;

// Scale blocks of a row of k elements, padded to whole tiles.
ABIDING_HD constexpr int64_t scale_columns(int64_t k) {
  return round_up(round_up(k, kScaleBlock) / kScaleBlock, kScaleTileBlocks);
}

// The offset of a scale from the first byte of its group; `columns` is scale_columns(k).
ABIDING_HD constexpr int64_t scale_at(int64_t row, int64_t block, int64_t columns) {
  return (row / kScaleTileRows * (columns / kScaleTileBlocks) + block / kScaleTileBlocks) * kScaleTileBytes +
         row % 32 * 16 + row % kScaleTileRows / 32 * 4 + block % kScaleTileBlocks;
}

struct RowRange {
  int64_t begin, count;
};

// How device arrays say which rows belong to which group (expert).
enum class OffsetForm {
  kStarts,    // [count + 1]: the groups' first rows, the total last
  kEnds,      // [count]: one past each group's last row, as torch's grouped GEMMs take them
  kProblems,  // [count] first rows, beside problem_sizes [count, 3] (the raw operators)
  kWhole      // no arrays: one group has all rows
};
struct Groups {
  int64_t count;
  int64_t rows;  // of the tensors
  OffsetForm form;
  const int32_t* offsets;
  const int32_t *problem_sizes, *scale_offsets;  // kProblems: (m, n, k), and the group's first row among the scales

  // Empty where the device's numbers lead outside of the tensors.
  ABIDING_HD RowRange range(int64_t group) const {
    if (form == OffsetForm::kWhole) return {0, rows};
    const int64_t begin = form == OffsetForm::kEnds ? (group ? offsets[group - 1] : 0) : offsets[group];
    const int64_t size = form == OffsetForm::kStarts ? offsets[group + 1] - begin
                         : form == OffsetForm::kEnds ? offsets[group] - begin
                                                     : problem_sizes[3 * group];
    return begin < 0 || size < 0 || begin + size > rows ? RowRange{0, 0} : RowRange{begin, size};
  }
};

// The buffer of activation scales: each group's rows padded to whole tiles, groups in order or where scale_offsets say.
struct ScaleBuffer {
  int64_t rows;     // a multiple of 128
  int64_t columns;  // scale_columns(k)

  // Whether the buffer holds the scales of a group of `group_rows` rows from its row `begin` on. A group that it does
  // not hold is not quantized, and dequantizes to NaN. Where groups are in order, `begin` counts the tiles of such
  // groups too.
  ABIDING_HD bool holds(int64_t begin, int64_t group_rows) const {
    return begin >= 0 && begin % kScaleTileRows == 0 && begin + round_up(group_rows, kScaleTileRows) <= rows;
  }
};

struct QuantizeParams {
  Groups groups;
  ScaleBuffer scale_buffer;
  int64_t k;
  const void* input;  // [rows, k]
  int64_t input_stride;
  DType dtype;    // of input
  bool rowwise;   // one code per row; its scale blocks have equal codes then
  uint8_t* data;  // e4m3 [rows, k]
  int64_t data_stride;
  uint8_t* scales;  // a group's tiles are written whole, zeros where it has no scale block
  bool clear_rest;  // also zero the tiles behind the last group that has scales
};

// What a rebase did to some rows: sums of squares, the largest error / norm of a row and the first row that has it (if
// it is not 0), elements whose value changed, rows that stayed.
struct RebaseTally {
  double error, norm, worst;
  int64_t worst_row, changed, left;
};

constexpr int kRebaseRows = 8;  // weight rows that are one unit of work

// out = weight with one code per row (rebase.h). The outputs may be the inputs.
struct RebaseParams {
  int64_t experts, n, k;
  const uint8_t* weight;  // e4m3 [experts, n, k]; strides in bytes
  int64_t expert_stride, stride;
  const uint8_t* scales;  // per expert round_up(n, 128) x scale_columns(k), in tiles
  uint8_t* out;
  int64_t out_expert_stride, out_stride;
  uint8_t* out_scales;
  RebaseTally* tallies;  // scratch: one per unit of work
  int64_t* counts;       // elements changed, rows left, worst row
  double* errors;        // root mean square of all, and of the worst row

  // Rows with scales: those of padding are copied.
  ABIDING_HD int64_t padded_rows() const { return round_up(n, kScaleTileRows); }
  ABIDING_HD int64_t units() const { return experts * (padded_rows() / kRebaseRows); }
};

// Quantizes and dequantizes in one step: out = bf16 of what the quantizer would keep of each element.
struct RoundParams {
  int64_t rows, k;
  const void* input;
  int64_t input_stride;
  DType dtype;  // of input
  void* out;
  int64_t out_stride;
};

// The format of the rows that this group's kernels write for its GEMMs; each GEMM names its own (kernels.h).
enum class RowFormat {
  kBf16,
  // bf16 with, in every 16 elements, pair 2c + h where pair 4h + c was (c = 0..3, h = 0, 1). Then the e4m3 bytes of a
  // weight row, whose order stays, that one thread's wgmma fragment needs are one word.
  kBf16Interleaved,
  // e4m3, with one fp32 scale per row.
  kE4m3
};

// How GEMMs compute: exact products of bf16 numbers, or products of e4m3 numbers with one scale per row on FP8 tensor
// cores. The numbers are those of the operators' argument.
enum class Compute { kExact = 0, kFp8 = 1 };

// The rows that a layer's kernels write for its GEMMs; dense.
struct GemmRows {
  RowFormat format;
  bool round;    // to what the quantizer would keep; kE4m3 is always quantized
  bool rowwise;  // with one code per row
  void* data;
  float* scales;  // of kE4m3: as GroupedMmParams has them
};

// The scales of e4m3 rows as GroupedMmParams has them, for the rows of all groups; NaN where a row's codes differ, or
// the buffer does not hold a group's scales.
struct RowScalesParams {
  Groups groups;
  ScaleBuffer scale_buffer;
  int64_t k;
  const uint8_t* scales;
  float* out;  // [rows]
};

// Whether weights are as Compute::kFp8 needs them, which a debug run looks at: one code per row. Rows are those of all
// experts, in order.
struct RowCodesRule {
  int64_t experts, n, k;
  const uint8_t* scales;  // as GroupedMmParams has them

  ABIDING_HD int64_t size() const { return experts * n; }
  ABIDING_HD int64_t value(int64_t) const { return 0; }
  ABIDING_HD bool accepts(int64_t i) const {
    const int64_t row = i % n, columns = scale_columns(k);
    const uint8_t* codes = scales + i / n * round_up(n, kScaleTileRows) * columns;
    bool same = true;
    for (int64_t block = 1; block < k / kScaleBlock; ++block)
      same &= codes[scale_at(row, block, columns)] == codes[scale_at(row, 0, columns)];
    return same;
  }
};

// bf16 of e4m3 data and scales, for the rows of all groups; NaN where the buffer does not hold a group's scales.
struct DequantizeParams {
  Groups groups;
  ScaleBuffer scale_buffer;
  int64_t k;
  const uint8_t* data;
  int64_t data_stride;
  const uint8_t* scales;
  void* out;
  int64_t out_stride;
  bool interleaved = false;
};

// out[rows of e] = a[rows of e] @ weight[e]^T, accumulated in fp32, rounded once.
struct GroupedMmParams {
  Groups groups;
  int64_t n, k;
  const void* a;  // bf16 [rows, k]; where a_scales is set, e4m3
  int64_t a_stride;
  const float* a_scales = nullptr;  // [rows], of e4m3 rows: powers of two, or NaN
  const uint8_t* weight;            // e4m3 [count, n, k]; strides in bytes
  int64_t weight_expert_stride, weight_stride;
  const uint8_t* weight_scales;  // per expert round_up(n, 128) x scale_columns(k), in tiles
  void* out;                     // [rows, n]
  int64_t out_stride;
  DType out_dtype;
  // Invariant 2 of the PDL contract (layer.cu) holds for group offsets and weights, so they may be read before
  // pdl_wait. It says nothing of `a`.
  bool inputs_ready_before_pdl;
  bool interleaved = false;  // a's rows
  // How many rows the groups are expected to have together. Under expert parallelism this is less than groups.rows, the
  // rows of the tensors. It is a hint, for the choice of the tile shape and of the cluster size alone.
  int64_t expected_rows;
};

// Routing: orders token-expert pairs by expert, and within an expert by token. Pairs of other ids have no row.
struct RouteParams {
  Indices ids;  // [tokens, top_k]
  int64_t tokens, top_k, experts;
  const int32_t* expert_map;  // [global_experts]: the local expert of an id, or -1; null if ids are local
  int64_t global_experts;
  int32_t* offsets;    // [experts + 1]: the experts' first rows, the total last
  int32_t* pair_rows;  // [tokens, top_k]: the row of each pair, or -1

  // The local expert of an id, or -1 if it is elsewhere or does not exist.
  ABIDING_HD int expert(int64_t id) const {
    if (expert_map) id = id >= 0 && id < global_experts ? expert_map[id] : -1;
    return id >= 0 && id < experts ? static_cast<int>(id) : -1;
  }
};

// Permute: out[pair_rows[t, j]] = x[t].
struct GatherParams {
  int64_t tokens, top_k, hidden;
  const int32_t* pair_rows;
  const void* x;  // bf16 [tokens, hidden]
  int64_t x_stride;
  GemmRows out;
};

// kSilu: silu(gate) * up. kSwiglu: gate * sigmoid(alpha * gate) * (up + beta), with gate <= limit and
// up in [-limit, limit]. Gate columns come first.
enum class Activation { kSilu, kSwiglu, kNone };
struct SwigluConstants {
  float alpha, beta, limit;
};
struct ActivateParams {
  int64_t max_rows;          // of the buffers
  const int32_t* used_rows;  // how many of them the call has, on the device
  int64_t intermediate;      // columns of the result
  const void* input;         // bf16, dense: [rows, 2 intermediate], or [rows, intermediate] for kNone
  Activation activation;
  GemmRows out;
  SwigluConstants swiglu;  // of kSwiglu
};

// Top-k weighted reduce (unpermute): out[t] = sum over j, in order, of weights[t, j] * input[pair_rows[t, j]].
struct CombineParams {
  int64_t tokens, top_k, hidden;
  const int32_t* pair_rows;
  const void* input;  // bf16, dense
  const float* weights;
  int64_t weights_stride;
  void* out;  // bf16 [tokens, hidden]
  int64_t out_stride;
};

}  // namespace abiding::mxfp8_moe
