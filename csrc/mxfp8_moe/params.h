// What the checks hand to a kernel: plain data, and the MXFP8 format that host and device share. No torch here.
#pragma once

#include <cstdint>

#include "common/dtypes.h"
#include "common/indices.h"
#include "common/numerics.h"

namespace abiding::mxfp8_moe {

constexpr int kBlock = 32;  // consecutive elements of a row that share a scale (OCP Microscaling formats)
constexpr int kMaxExperts = 1024;
constexpr int kMaxTopK = 16;

// Scales are kept in tiles of 128 rows x 4 blocks, 512 bytes: what cuBLAS calls VEC32_UE8M0 and torch SWIZZLE_32_4_4. In
// a tile, rows r, r + 32, r + 64, r + 96 lie side by side. Tiles run along a row first.
constexpr int kTileRows = 128, kTileBlocks = 4, kTileBytes = kTileRows * kTileBlocks;

// Blocks of a row of k elements, with those that fill the last tile.
ABIDING_HD constexpr int64_t scale_columns(int64_t k) { return round_up(round_up(k, kBlock) / kBlock, kTileBlocks); }

// Where the scale of a row's block is, from the first byte of its group; `columns` as above.
ABIDING_HD constexpr int64_t scale_at(int64_t row, int64_t block, int64_t columns) {
  return (row / kTileRows * (columns / kTileBlocks) + block / kTileBlocks) * kTileBytes + row % 32 * 16 +
         row % kTileRows / 32 * 4 + block % kTileBlocks;
}

// A row range; empty where the device's numbers lead outside of the tensors.
struct Span {
  int64_t begin, rows;
};

// How the rows of a call belong to experts; read on the device. Offsets come in one of three forms: starts with the total
// last [count + 1], ends [count] as torch's grouped products take them, or starts [count] beside problem sizes [count, 3].
// With kWhole there are none, and one group has all rows.
enum class Offsets { kStarts, kEnds, kProblems, kWhole };
struct Groups {
  int64_t count;
  int64_t rows;  // of the tensors
  Offsets form;
  const int32_t* offsets;
  const int32_t *problem_sizes,
      *scale_offsets;  // form kProblems: (m, n, k), and the group's first row among the scales

  ABIDING_HD Span span(int64_t group) const {
    if (form == Offsets::kWhole) return {0, rows};
    const int64_t begin = form == Offsets::kEnds ? (group ? offsets[group - 1] : 0) : offsets[group];
    const int64_t size = form == Offsets::kStarts ? offsets[group + 1] - begin
                         : form == Offsets::kEnds ? offsets[group] - begin
                                                  : problem_sizes[3 * group];
    return begin < 0 || size < 0 || begin + size > rows ? Span{0, 0} : Span{begin, size};
  }
};

// Activation scales: each group's rows padded to whole tiles, one group after the other, or where scale_offsets say.
struct ScaleRows {
  int64_t rows;     // of the buffer, a multiple of 128
  int64_t columns;  // scale_columns(k)

  // Whether a group of so many rows has scales at all from row `begin` on. One that has none is not quantised, and its
  // rows are dequantised to NaN. Where groups follow each other, `begin` counts the tiles of those without scales too.
  ABIDING_HD bool hold(int64_t begin, int64_t group_rows) const {
    return begin >= 0 && begin % kTileRows == 0 && begin + round_up(group_rows, kTileRows) <= rows;
  }
};

struct QuantizeParams {
  Groups groups;
  ScaleRows scale_rows;
  int64_t k;
  const void* input;  // [rows, k]
  int64_t input_stride;
  DType dtype;    // of input
  uint8_t* data;  // [rows, k] e4m3
  int64_t data_stride;
  uint8_t* scales;  // a group's tiles are written whole, with zeros where it has no block
  bool clear_rest;  // and so are the rows behind the last group that has scales
};

// bf16 that holds what the quantiser would keep of each element.
struct RoundParams {
  int64_t rows, k;
  const void* input;
  int64_t input_stride;
  DType dtype;  // of input
  void* out;
  int64_t out_stride;
};

// Rows that only a product reads may be `interleaved`: of every 16 elements the pair 2c + h lies where the pair 4h + c was (c = 0
// to 3, h = 0 or 1). Then what a thread of a warpgroup multiplies of a weight's row, whose order stays, is one word.

// bf16 of e4m3 data and their scales, for rows of the groups; NaN where a group's scales lie outside of the buffer.
struct DequantizeParams {
  Groups groups;
  ScaleRows scale_rows;
  int64_t k;
  const uint8_t* data;
  int64_t data_stride;
  const uint8_t* scales;
  void* out;
  int64_t out_stride;
  bool interleaved = false;
};

// out[rows of e] = a[rows of e] * weight[e]^T, fp32 sums, rounded once.
struct GroupedMmParams {
  Groups groups;
  int64_t n, k;
  const void* a;  // bf16 [rows, k]
  int64_t a_stride;
  const uint8_t* weight;  // e4m3 [count, n, k]; strides in bytes
  int64_t weight_expert_stride, weight_stride;
  const uint8_t* weight_scales;  // per expert round_up(n, 128) x scale_columns(k), in tiles
  void* out;                     // [rows, n]
  int64_t out_stride;
  DType out_dtype;
  // What wrote groups and weights has ended when this kernel starts, though the kernel before it may still run.
  bool settled;
  bool interleaved = false;  // a's rows
};

// Token-expert pairs ordered by expert, within one by token. Pairs of other ids have no row.
struct RouteParams {
  Indices ids;  // [tokens, top_k]
  int64_t tokens, top_k, experts;
  int32_t* offsets;  // [experts + 1] starts, the total last
  int32_t* rows;     // [tokens, top_k]: the row of each pair, or -1
};

// rows[rows[t, j]] = x[t], as it is or rounded as RoundParams says.
struct GatherParams {
  int64_t tokens, top_k, k;
  const int32_t* rows;
  const void* x;  // bf16 [tokens, k]
  int64_t x_stride;
  bool round;
  void* out;  // bf16, dense
  bool interleaved = false;
};

// kSilu: silu(gate) * up; kSwigluOai: gate <= 7, up in [-7, 7], gate * sigmoid(1.702 gate) * (up + 1); gate columns first.
enum class Activation { kSilu, kSwigluOai, kNone };
struct ActivateParams {
  int64_t rows;          // of the buffers
  const int32_t* total;  // rows in use
  int64_t width;         // columns of the result
  const void* input;     // bf16, dense: [rows, 2 width], [rows, width] for kNone
  Activation activation;
  bool round;
  void* out;  // bf16, dense
  bool interleaved = false;
};

// out[t] = sum over j, in order, of weights[t, j] * rows[rows[t, j]].
struct CombineParams {
  int64_t tokens, top_k, k;
  const int32_t* rows;
  const void* input;  // bf16, dense
  const float* weights;
  int64_t weights_stride;
  void* out;  // bf16 [tokens, k]
  int64_t out_stride;
};

}  // namespace abiding::mxfp8_moe
