#include "common/cpu.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>

#include "mxfp8_moe/activation.h"
#include "mxfp8_moe/operators.h"
#include "mxfp8_moe/quantizer.h"

namespace abiding::mxfp8_moe {
namespace {

using BFloat16 = HostType<DTypeTag<DType::kBfloat16>>;
using Float16 = HostType<DTypeTag<DType::kFloat16>>;

constexpr int kBlockN = 16;     // weight rows that are dequantized together
constexpr int64_t kGrain = 16;  // rows that are worth a thread

float from_bfloat16(uint16_t bits) { return bits_float(static_cast<uint32_t>(bits) << 16); }
uint16_t to_bfloat16(float x) { return static_cast<uint16_t>(float_bits(round_to_bfloat16(x)) >> 16); }

// A group's rows, and its first row among the scales; -1 if the buffer does not hold them.
struct GroupRows {
  RowRange rows;
  int64_t scale_begin;
};

std::vector<GroupRows> locate(const Groups& groups, const ScaleBuffer& scales) {
  std::vector<GroupRows> located;
  int64_t next = 0;
  for (int64_t group = 0; group < groups.count; ++group) {
    const RowRange rows = groups.range(group);
    const int64_t begin = groups.form == OffsetForm::kProblems ? groups.scale_offsets[group] : next;
    next += round_up(rows.count, kScaleTileRows);
    located.push_back({rows, scales.holds(begin, rows.count) ? begin : -1});
  }
  return located;
}

// The code of `size` elements.
template <class T>
uint8_t code_for(const T* x, int64_t size) {
  float amax = NAN;
  for (int64_t i = 0; i < size; ++i) amax = larger_magnitude(amax, static_cast<float>(x[i]));
  return quantize_code(amax);
}

// Calls of_block(block, code) and then of_element(i, byte, code), with i in the row, for each scale block of a row.
template <class T, class OfBlock, class OfElement>
void quantize_row(const T* x, int64_t k, bool rowwise, const OfBlock& of_block, const OfElement& of_element) {
  const uint8_t of_row = rowwise ? code_for(x, k) : uint8_t{0};
  for (int64_t block = 0; block < k / kScaleBlock; ++block) {
    const int64_t begin = block * kScaleBlock;
    const uint8_t code = rowwise ? of_row : code_for(x + begin, kScaleBlock);
    of_block(block, code);
    for (int64_t i = begin; i < begin + kScaleBlock; ++i)
      of_element(i, quantize_element(static_cast<float>(x[i]), code), code);
  }
}

template <class T>
void round_row(const T* x, int64_t k, bool rowwise, uint16_t* out) {
  quantize_row(
      x, k, rowwise, [](int64_t, uint8_t) {},
      [&](int64_t i, uint8_t byte, uint8_t code) { out[i] = to_bfloat16(dequantize(byte, code)); });
}

// A row of a layer for its GEMMs.
void write_row(const BFloat16* x, int64_t k, const GemmRows& rows, int64_t row) {
  auto* bf16 = static_cast<uint16_t*>(rows.data) + row * k;
  if (rows.format == RowFormat::kE4m3)
    quantize_row(
        x, k, true, [&](int64_t, uint8_t code) { rows.scales[row] = ue8m0_decode(code); },
        [&](int64_t i, uint8_t byte, uint8_t) { static_cast<uint8_t*>(rows.data)[row * k + i] = byte; });
  else if (rows.round)
    round_row(x, k, rows.rowwise, bf16);
  else
    std::copy_n(reinterpret_cast<const uint16_t*>(x), k, bf16);
}

template <class T>
void quantize(const QuantizeParams& p) {
  int64_t end = 0;
  for (const GroupRows& group : locate(p.groups, p.scale_buffer)) {
    if (group.scale_begin < 0) continue;
    uint8_t* scales = p.scales + group.scale_begin * p.scale_buffer.columns;
    const int64_t padded = round_up(group.rows.count, kScaleTileRows);
    std::fill_n(scales, padded * p.scale_buffer.columns, uint8_t{0});
    end = group.scale_begin + padded;
    parallel_for(0, group.rows.count, kGrain, [&](int64_t begin, int64_t end_row) {
      for (int64_t row = begin; row < end_row; ++row) {
        const int64_t at = group.rows.begin + row;
        const T* x = static_cast<const T*>(p.input) + at * p.input_stride;
        quantize_row(
            x, p.k, p.rowwise,
            [&](int64_t block, uint8_t code) { scales[scale_at(row, block, p.scale_buffer.columns)] = code; },
            [&](int64_t i, uint8_t byte, uint8_t) { p.data[at * p.data_stride + i] = byte; });
      }
    });
  }
  if (p.clear_rest)
    std::fill_n(p.scales + end * p.scale_buffer.columns, (p.scale_buffer.rows - end) * p.scale_buffer.columns,
                uint8_t{0});
}

template <class T>
void round(const RoundParams& p) {
  parallel_for(0, p.rows, kGrain, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row)
      round_row(static_cast<const T*>(p.input) + row * p.input_stride, p.k, false,
                static_cast<uint16_t*>(p.out) + row * p.out_stride);
  });
}

// The values of all bytes with a scale of 1.
const float* e4m3_values() {
  static const std::vector<float> values = [] {
    std::vector<float> all(256);
    for (int byte = 0; byte < 256; ++byte) all[byte] = e4m3_decode(static_cast<uint8_t>(byte));
    return all;
  }();
  return values.data();
}

// dequantize() by a table: between codes 3 and 246 nothing is rounded.
void dequantize_weights(const uint8_t* data, const uint8_t* scales, int64_t row, int64_t k, float* out) {
  const float* values = e4m3_values();
  for (int64_t block = 0; block < k / kScaleBlock; ++block, data += kScaleBlock, out += kScaleBlock) {
    const uint8_t code = scales[scale_at(row, block, scale_columns(k))];
    if (code >= 3 && code <= 246) {
      const float scale = pow2(code - 127);
      for (int i = 0; i < kScaleBlock; ++i) out[i] = values[data[i]] * scale;
    } else {
      for (int i = 0; i < kScaleBlock; ++i) out[i] = dequantize(data[i], code);
    }
  }
}

// Independent partial sums let the compiler vectorize without reordering additions.
float dot(const float* a, const float* b, int64_t k) {
  float sums[kScaleBlock] = {};
  for (int64_t i = 0; i < k; i += kScaleBlock)
    for (int lane = 0; lane < kScaleBlock; ++lane) sums[lane] += a[i + lane] * b[i + lane];
  for (int width = kScaleBlock / 2; width; width /= 2)
    for (int lane = 0; lane < width; ++lane) sums[lane] += sums[lane + width];
  return sums[0];
}

// The epilogue: a sum is rounded once.
void store(const GroupedMmParams& p, int64_t at, float value) {
  if (p.out_dtype == DType::kFloat32)
    static_cast<float*>(p.out)[at] = value;
  else if (p.out_dtype == DType::kBfloat16)
    static_cast<uint16_t*>(p.out)[at] = to_bfloat16(value);
  else
    static_cast<Float16*>(p.out)[at] = static_cast<Float16>(value);
}

// Every row of one group with kBlockN rows of its weights (n is a multiple of that).
void gemm_tile(const GroupedMmParams& p, int64_t group, const RowRange& rows, int64_t first, float* weights,
               float* row) {
  const uint8_t* scales = p.weight_scales + group * round_up(p.n, kScaleTileRows) * scale_columns(p.k);
  for (int j = 0; j < kBlockN; ++j)
    dequantize_weights(p.weight + group * p.weight_expert_stride + (first + j) * p.weight_stride, scales, first + j,
                       p.k, weights + j * p.k);
  for (int64_t i = rows.begin; i < rows.begin + rows.count; ++i) {
    const uint16_t* a = static_cast<const uint16_t*>(p.a) + i * p.a_stride;
    for (int64_t k = 0; k < p.k; ++k) row[k] = from_bfloat16(a[k]);
    for (int j = 0; j < kBlockN; ++j) store(p, i * p.out_stride + first + j, dot(row, weights + j * p.k, p.k));
  }
}

// The scale of a row with one code: NaN where its codes differ. `scales` has the tiles of its group.
float row_scale(const uint8_t* scales, int64_t row, int64_t k) {
  const int64_t columns = scale_columns(k);
  const uint8_t code = scales[scale_at(row, 0, columns)];
  for (int64_t block = 1; block < k / kScaleBlock; ++block)
    if (scales[scale_at(row, block, columns)] != code) return NAN;
  return ue8m0_decode(code);
}

// The same of Compute::kFp8: products of bytes, whose sums are scaled.
void fp8_tile(const GroupedMmParams& p, int64_t group, const RowRange& rows, int64_t first, float* weights,
              float* row) {
  const float* values = e4m3_values();
  const uint8_t* scales = p.weight_scales + group * round_up(p.n, kScaleTileRows) * scale_columns(p.k);
  float weight_scales[kBlockN];
  for (int j = 0; j < kBlockN; ++j) {
    const uint8_t* from = p.weight + group * p.weight_expert_stride + (first + j) * p.weight_stride;
    for (int64_t k = 0; k < p.k; ++k) weights[j * p.k + k] = values[from[k]];
    weight_scales[j] = row_scale(scales, first + j, p.k);
  }
  for (int64_t i = rows.begin; i < rows.begin + rows.count; ++i) {
    const uint8_t* a = static_cast<const uint8_t*>(p.a) + i * p.a_stride;
    for (int64_t k = 0; k < p.k; ++k) row[k] = values[a[k]];
    for (int j = 0; j < kBlockN; ++j)
      store(p, i * p.out_stride + first + j, dot(row, weights + j * p.k, p.k) * p.a_scales[i] * weight_scales[j]);
  }
}

}  // namespace

void run_cpu(const RebaseParams& p);  // in rebase_cpu.cpp
void run_cpu(const QuantizeParams& p) {
  dispatch_16_bit(p.dtype, [&](auto tag) { quantize<HostType<decltype(tag)>>(p); });
}
void run_cpu(const RoundParams& p) {
  dispatch_16_bit(p.dtype, [&](auto tag) { round<HostType<decltype(tag)>>(p); });
}

// The implementations of the grouped GEMM on the CPU: one for each way to compute.
struct CpuGroupedMm {
  const char* name;
  RowFormat row_format;
};
template <class Gemms>
const CpuGroupedMm& choose_grouped_mm(const char*, const CpuScope&, Compute compute, const Gemms&) {
  static constexpr CpuGroupedMm exact{"cpu", RowFormat::kBf16}, fp8{"cpu_fp8", RowFormat::kE4m3};
  return compute == Compute::kFp8 ? fp8 : exact;
}

void run_cpu(const RowScalesParams& p) {
  for (const GroupRows& group : locate(p.groups, p.scale_buffer))
    for (int64_t row = 0; row < group.rows.count; ++row)
      p.out[group.rows.begin + row] =
          group.scale_begin < 0 ? NAN : row_scale(p.scales + group.scale_begin * p.scale_buffer.columns, row, p.k);
}
void run_cpu(const DequantizeParams& p) {
  for (const GroupRows& group : locate(p.groups, p.scale_buffer)) {
    const uint8_t* scales = p.scales + group.scale_begin * p.scale_buffer.columns;
    parallel_for(0, group.rows.count, kGrain, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        const uint8_t* data = p.data + (group.rows.begin + row) * p.data_stride;
        uint16_t* out = static_cast<uint16_t*>(p.out) + (group.rows.begin + row) * p.out_stride;
        for (int64_t k = 0; k < p.k; ++k) {
          const uint8_t code =
              group.scale_begin < 0 ? 255 : scales[scale_at(row, k / kScaleBlock, p.scale_buffer.columns)];
          out[k] = to_bfloat16(dequantize(data[k], code));
        }
      }
    });
  }
}

void run_cpu(const GroupedMmParams& p, const CpuGroupedMm& impl) {
  const int64_t tiles = p.n / kBlockN;
  parallel_for(0, p.groups.count * tiles, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> buffer((kBlockN + 1) * p.k);
    for (int64_t i = begin; i < end; ++i) {
      const RowRange rows = p.groups.range(i / tiles);
      const auto& tile = impl.row_format == RowFormat::kE4m3 ? fp8_tile : gemm_tile;
      if (rows.count > 0) tile(p, i / tiles, rows, i % tiles * kBlockN, buffer.data(), buffer.data() + kBlockN * p.k);
    }
  });
}

void run_cpu(const RouteParams& p) {
  std::fill_n(p.offsets, p.experts + 1, 0);
  for (int64_t pair = 0; pair < p.tokens * p.top_k; ++pair)
    if (const int expert = p.expert(p.ids[pair]); expert >= 0) ++p.offsets[expert + 1];
  for (int64_t expert = 0; expert < p.experts; ++expert) p.offsets[expert + 1] += p.offsets[expert];
  std::vector<int32_t> next(p.offsets, p.offsets + p.experts);
  for (int64_t pair = 0; pair < p.tokens * p.top_k; ++pair) {
    const int expert = p.expert(p.ids[pair]);
    p.pair_rows[pair] = expert < 0 ? -1 : next[expert]++;
  }
}

void run_cpu(const GatherParams& p) {
  parallel_for(0, p.tokens * p.top_k, kGrain, [&](int64_t begin, int64_t end) {
    for (int64_t pair = begin; pair < end; ++pair) {
      if (p.pair_rows[pair] < 0) continue;
      const int64_t from = pair / p.top_k * p.x_stride;
      write_row(static_cast<const BFloat16*>(p.x) + from, p.hidden, p.out, p.pair_rows[pair]);
    }
  });
}

void run_cpu(const ActivateParams& p) {
  const int64_t columns = p.activation == Activation::kNone ? p.intermediate : 2 * p.intermediate;
  parallel_for(0, *p.used_rows, kGrain, [&](int64_t begin, int64_t end) {
    std::vector<uint16_t> out(p.intermediate);
    for (int64_t row = begin; row < end; ++row) {
      const uint16_t* from = static_cast<const uint16_t*>(p.input) + row * columns;
      for (int64_t i = 0; i < p.intermediate; ++i)
        out[i] = p.activation == Activation::kNone
                     ? from[i]
                     : to_bfloat16(activated(p.activation, p.swiglu, from_bfloat16(from[i]),
                                             from_bfloat16(from[p.intermediate + i])));
      write_row(reinterpret_cast<const BFloat16*>(out.data()), p.intermediate, p.out, row);
    }
  });
}

void run_cpu(const CombineParams& p) {
  parallel_for(0, p.tokens, kGrain, [&](int64_t begin, int64_t end) {
    std::vector<float> sums(p.hidden);
    for (int64_t token = begin; token < end; ++token) {
      std::fill(sums.begin(), sums.end(), 0.0f);
      for (int64_t j = 0; j < p.top_k; ++j) {
        const int64_t row = p.pair_rows[token * p.top_k + j];
        if (row < 0) continue;
        const float weight = p.weights[token * p.weights_stride + j];
        const uint16_t* from = static_cast<const uint16_t*>(p.input) + row * p.hidden;
        for (int64_t i = 0; i < p.hidden; ++i) sums[i] += weight * from_bfloat16(from[i]);
      }
      uint16_t* out = static_cast<uint16_t*>(p.out) + token * p.out_stride;
      for (int64_t i = 0; i < p.hidden; ++i) out[i] = to_bfloat16(sums[i]);
    }
  });
}

ABIDING_KERNELS(abiding, CPU, mxfp8_moe, m) { Operators<CpuScope>::implement(m); }
ABIDING_KERNELS(abiding, CompositeExplicitAutograd, mxfp8_moe_sizes, m) {
  m.impl("mxfp8_moe_workspace_bytes", ABIDING_BOX(check_workspace_bytes));
}

}  // namespace abiding::mxfp8_moe
