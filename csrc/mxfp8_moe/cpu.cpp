#include "common/cpu.h"

#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>

#include "mxfp8_moe/activation.h"
#include "mxfp8_moe/operators.h"
#include "mxfp8_moe/quantizer.h"

namespace abiding::mxfp8_moe {
namespace {

using torch::headeronly::BFloat16;
using Float16 = torch::headeronly::Half;
using torch::stable::parallel_for;

constexpr int kTile = 16;       // weight rows that are dequantised together
constexpr int64_t kGrain = 16;  // rows that are worth a thread

float from_bfloat16(uint16_t bits) { return bits_float(static_cast<uint32_t>(bits) << 16); }
uint16_t to_bfloat16(float x) { return static_cast<uint16_t>(float_bits(round_to_bfloat16(x)) >> 16); }

// Where each group's rows and scales begin; a group without scales has begin -1 there.
struct Placed {
  Span span;
  int64_t scales;
};

std::vector<Placed> place(const Groups& groups, const ScaleRows& scales) {
  std::vector<Placed> placed;
  int64_t next = 0;
  for (int64_t group = 0; group < groups.count; ++group) {
    const Span span = groups.span(group);
    const int64_t begin = groups.form == Offsets::kProblems ? groups.scale_offsets[group] : next;
    next += round_up(span.rows, kTileRows);
    placed.push_back({span, scales.hold(begin, span.rows) ? begin : -1});
  }
  return placed;
}

template <class T>
uint8_t block_code(const T* x) {
  float amax = NAN;
  for (int i = 0; i < kBlock; ++i) amax = larger_magnitude(amax, static_cast<float>(x[i]));
  return quantize_code(amax);
}

template <class T>
void quantize_row(const T* x, int64_t k, uint8_t* data, uint8_t* scales, int64_t row, int64_t columns) {
  for (int64_t block = 0; block < k / kBlock; ++block, x += kBlock, data += kBlock) {
    const uint8_t code = block_code(x);
    for (int i = 0; i < kBlock; ++i) data[i] = quantize_element(static_cast<float>(x[i]), code);
    scales[scale_at(row, block, columns)] = code;
  }
}

template <class T>
void round_row(const T* x, int64_t k, uint16_t* out) {
  for (int64_t block = 0; block < k / kBlock; ++block, x += kBlock, out += kBlock) {
    const uint8_t code = block_code(x);
    for (int i = 0; i < kBlock; ++i)
      out[i] = to_bfloat16(dequantize(quantize_element(static_cast<float>(x[i]), code), code));
  }
}

template <class T>
void quantize(const QuantizeParams& p) {
  int64_t end = 0;
  for (const Placed& group : place(p.groups, p.scale_rows)) {
    if (group.scales < 0) continue;
    uint8_t* scales = p.scales + group.scales * p.scale_rows.columns;
    const int64_t padded = round_up(group.span.rows, kTileRows);
    std::fill_n(scales, padded * p.scale_rows.columns, uint8_t{0});
    end = group.scales + padded;
    parallel_for(0, group.span.rows, kGrain, [&](int64_t begin, int64_t end_row) {
      for (int64_t row = begin; row < end_row; ++row) {
        const int64_t at = group.span.begin + row;
        quantize_row(static_cast<const T*>(p.input) + at * p.input_stride, p.k, p.data + at * p.data_stride, scales,
                     row, p.scale_rows.columns);
      }
    });
  }
  if (p.clear_rest)
    std::fill_n(p.scales + end * p.scale_rows.columns, (p.scale_rows.rows - end) * p.scale_rows.columns, uint8_t{0});
}

template <class T>
void round(const RoundParams& p) {
  parallel_for(0, p.rows, kGrain, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row)
      round_row(static_cast<const T*>(p.input) + row * p.input_stride, p.k,
                static_cast<uint16_t*>(p.out) + row * p.out_stride);
  });
}

void dequantize_rows(const DequantizeParams& p) {
  for (const Placed& group : place(p.groups, p.scale_rows)) {
    const uint8_t* scales = p.scales + group.scales * p.scale_rows.columns;
    parallel_for(0, group.span.rows, kGrain, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        const uint8_t* data = p.data + (group.span.begin + row) * p.data_stride;
        uint16_t* out = static_cast<uint16_t*>(p.out) + (group.span.begin + row) * p.out_stride;
        for (int64_t k = 0; k < p.k; ++k) {
          const uint8_t code = group.scales < 0 ? 255 : scales[scale_at(row, k / kBlock, p.scale_rows.columns)];
          out[k] = to_bfloat16(dequantize(data[k], code));
        }
      }
    });
  }
}

// The same values as dequantize() makes, by a table: between codes 3 and 246 nothing is rounded.
void dequantize_weights(const uint8_t* data, const uint8_t* scales, int64_t row, int64_t k, float* out) {
  static const std::vector<float> values = [] {
    std::vector<float> all(256);
    for (int byte = 0; byte < 256; ++byte) all[byte] = dequantize(static_cast<uint8_t>(byte), 127);
    return all;
  }();
  for (int64_t block = 0; block < k / kBlock; ++block, data += kBlock, out += kBlock) {
    const uint8_t code = scales[scale_at(row, block, scale_columns(k))];
    if (code >= 3 && code <= 246) {
      const float scale = pow2(code - 127);
      for (int i = 0; i < kBlock; ++i) out[i] = values[data[i]] * scale;
    } else {
      for (int i = 0; i < kBlock; ++i) out[i] = dequantize(data[i], code);
    }
  }
}

// Partial sums side by side let the compiler use vectors without reordering anything.
float dot(const float* a, const float* b, int64_t k) {
  float sums[kBlock] = {};
  for (int64_t i = 0; i < k; i += kBlock)
    for (int lane = 0; lane < kBlock; ++lane) sums[lane] += a[i + lane] * b[i + lane];
  for (int width = kBlock / 2; width; width /= 2)
    for (int lane = 0; lane < width; ++lane) sums[lane] += sums[lane + width];
  return sums[0];
}

void store(const GroupedMmParams& p, int64_t at, float value) {
  if (p.out_dtype == DType::kFloat32)
    static_cast<float*>(p.out)[at] = value;
  else if (p.out_dtype == DType::kBfloat16)
    static_cast<uint16_t*>(p.out)[at] = to_bfloat16(value);
  else
    static_cast<Float16*>(p.out)[at] = static_cast<Float16>(value);
}

// Every row of one group with kTile rows of its weights (n is a multiple of that).
void product_tile(const GroupedMmParams& p, int64_t group, const Span& span, int64_t first, float* weights,
                  float* row) {
  const uint8_t* scales = p.weight_scales + group * round_up(p.n, kTileRows) * scale_columns(p.k);
  for (int j = 0; j < kTile; ++j)
    dequantize_weights(p.weight + group * p.weight_expert_stride + (first + j) * p.weight_stride, scales, first + j,
                       p.k, weights + j * p.k);
  for (int64_t i = span.begin; i < span.begin + span.rows; ++i) {
    const uint16_t* a = static_cast<const uint16_t*>(p.a) + i * p.a_stride;
    for (int64_t k = 0; k < p.k; ++k) row[k] = from_bfloat16(a[k]);
    for (int j = 0; j < kTile; ++j) store(p, i * p.out_stride + first + j, dot(row, weights + j * p.k, p.k));
  }
}

void grouped_product(const GroupedMmParams& p) {
  const int64_t tiles = p.n / kTile;
  parallel_for(0, p.groups.count * tiles, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> buffer((kTile + 1) * p.k);
    for (int64_t i = begin; i < end; ++i) {
      const Span span = p.groups.span(i / tiles);
      if (span.rows > 0)
        product_tile(p, i / tiles, span, i % tiles * kTile, buffer.data(), buffer.data() + kTile * p.k);
    }
  });
}

void route_pairs(const RouteParams& p) {
  std::fill_n(p.offsets, p.experts + 1, 0);
  const auto expert_of = [&p](int64_t pair) {
    const int64_t id = p.ids[pair];
    return id < 0 || id >= p.experts ? -1 : id;
  };
  for (int64_t pair = 0; pair < p.tokens * p.top_k; ++pair)
    if (const int64_t expert = expert_of(pair); expert >= 0) ++p.offsets[expert + 1];
  for (int64_t expert = 0; expert < p.experts; ++expert) p.offsets[expert + 1] += p.offsets[expert];
  std::vector<int32_t> next(p.offsets, p.offsets + p.experts);
  for (int64_t pair = 0; pair < p.tokens * p.top_k; ++pair) {
    const int64_t expert = expert_of(pair);
    p.rows[pair] = expert < 0 ? -1 : next[expert]++;
  }
}

void gather_rows(const GatherParams& p) {
  parallel_for(0, p.tokens * p.top_k, kGrain, [&](int64_t begin, int64_t end) {
    for (int64_t pair = begin; pair < end; ++pair) {
      if (p.rows[pair] < 0) continue;
      const int64_t from = pair / p.top_k * p.x_stride;
      uint16_t* out = static_cast<uint16_t*>(p.out) + p.rows[pair] * p.k;
      if (p.round)
        round_row(static_cast<const BFloat16*>(p.x) + from, p.k, out);
      else
        std::copy_n(static_cast<const uint16_t*>(p.x) + from, p.k, out);
    }
  });
}

void activate_rows(const ActivateParams& p) {
  const int64_t columns = p.activation == Activation::kNone ? p.width : 2 * p.width;
  parallel_for(0, *p.total, kGrain, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const uint16_t* from = static_cast<const uint16_t*>(p.input) + row * columns;
      uint16_t* out = static_cast<uint16_t*>(p.out) + row * p.width;
      for (int64_t i = 0; i < p.width; ++i)
        out[i] = p.activation == Activation::kNone
                     ? from[i]
                     : to_bfloat16(activated(p.activation, from_bfloat16(from[i]), from_bfloat16(from[p.width + i])));
      if (p.round) round_row(reinterpret_cast<const BFloat16*>(out), p.width, out);
    }
  });
}

void combine_rows(const CombineParams& p) {
  parallel_for(0, p.tokens, kGrain, [&](int64_t begin, int64_t end) {
    std::vector<float> sums(p.k);
    for (int64_t token = begin; token < end; ++token) {
      std::fill(sums.begin(), sums.end(), 0.0f);
      for (int64_t j = 0; j < p.top_k; ++j) {
        const int64_t row = p.rows[token * p.top_k + j];
        if (row < 0) continue;
        const float weight = p.weights[token * p.weights_stride + j];
        const uint16_t* from = static_cast<const uint16_t*>(p.input) + row * p.k;
        for (int64_t i = 0; i < p.k; ++i) sums[i] += weight * from_bfloat16(from[i]);
      }
      uint16_t* out = static_cast<uint16_t*>(p.out) + token * p.out_stride;
      for (int64_t i = 0; i < p.k; ++i) out[i] = to_bfloat16(sums[i]);
    }
  });
}

struct Backend : CpuScope {
  using CpuScope::CpuScope;
  void quantize(const QuantizeParams& p) const {
    dispatch_16_bit(p.dtype, [&](auto tag) { mxfp8_moe::quantize<HostType<decltype(tag)>>(p); });
  }
  void round(const RoundParams& p) const {
    dispatch_16_bit(p.dtype, [&](auto tag) { mxfp8_moe::round<HostType<decltype(tag)>>(p); });
  }
  void dequantize(const DequantizeParams& p) const { dequantize_rows(p); }
  void grouped_mm(const GroupedMmParams& p) const { grouped_product(p); }
  static constexpr bool takes_interleaved() { return false; }
  void route(const RouteParams& p) const { route_pairs(p); }
  void gather(const GatherParams& p) const { gather_rows(p); }
  void activate(const ActivateParams& p) const { activate_rows(p); }
  void combine(const CombineParams& p) const { combine_rows(p); }
};

}  // namespace

ABIDING_KERNELS(abiding, CPU, mxfp8_moe, m) { Operators<Backend>::implement(m); }
ABIDING_KERNELS(abiding, CompositeExplicitAutograd, mxfp8_moe_sizes, m) {
  m.impl("mxfp8_moe_workspace_bytes", ABIDING_BOX(check_workspace_bytes));
}

}  // namespace abiding::mxfp8_moe
