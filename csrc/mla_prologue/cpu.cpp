#include "common/cpu.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>

#include "mla_prologue/operators.h"

namespace abiding::mla_prologue {
namespace {

template <class T>
void load_row(const T* from, float (&x)[kHeadDim]) {
  for (int d = 0; d < kHeadDim; ++d) x[d] = static_cast<float>(from[d]);
}

template <class T>
void store_row(const float (&x)[kHeadDim], T* to) {
  for (int d = 0; d < kHeadDim; ++d) to[d] = static_cast<T>(x[d]);
}

void store_row_e4m3(const float (&x)[kHeadDim], float factor, uint8_t* to) {
  for (int d = 0; d < kHeadDim; ++d) to[d] = e4m3_encode(x[d] * factor);
}

void rotate_row(float (&x)[kHeadDim], const float* cos_sin) {
  for (int j = 0; j < kRopeDim / 2; ++j)
    rotate(x[kNopeDim + 2 * j], x[kNopeDim + 2 * j + 1], cos_sin[j], cos_sin[kRopeDim / 2 + j]);
}

// 1 / sqrt(mean(x^2) + eps). The 16 independent partial sums let the compiler vectorize without reassociating a sum.
float inverse_rms(const float (&x)[kHeadDim], float eps) {
  float sums[16] = {};
  for (int d = 0; d < kHeadDim; d += 16)
    for (int lane = 0; lane < 16; ++lane) sums[lane] += x[d + lane] * x[d + lane];
  for (int width = 8; width; width /= 2)
    for (int lane = 0; lane < width; ++lane) sums[lane] += sums[lane + width];
  return 1.0f / std::sqrt(sums[0] / kHeadDim + eps);
}

template <class T>
void store_record(const float (&x)[kHeadDim], const Record<uint8_t>& record) {
  T rounded[kHeadDim];
  store_row(x, rounded);
  for (int i = 0; i < kQuantBlocks; ++i) {
    const T* values = rounded + i * kQuantBlock;
    float amax = 0;
    for (int d = 0; d < kQuantBlock; ++d) amax = std::fmax(amax, std::fabs(static_cast<float>(values[d])));
    const int exponent = quant_block_exponent(amax);
    for (int d = 0; d < kQuantBlock; ++d)
      record.data[i * kQuantBlock + d] = e4m3_encode(static_cast<float>(values[d]) * pow2(-exponent));
    record.scales[i] = ue8m0_encode(exponent);
  }
  std::memcpy(record.data + kNopeDim, rounded + kNopeDim, kRopeDim * sizeof(T));
  record.scales[kQuantBlocks] = 0;
}

template <class T>
void insert_row(const PrologueParams& p, int64_t token) {
  const int64_t slot = p.slot(token), position = p.positions[token];
  if (slot < 0 || !p.position_ok(position)) return;
  float x[kHeadDim];
  load_row(static_cast<const T*>(p.kv) + token * p.kv_stride, x);
  rotate_row(x, p.cos_sin + position * kRopeDim);
  for (float& value : x)
    if (std::isnan(value)) value = NAN;  // one NaN pattern, so that cache bytes do not depend on how a NaN was made
  if (p.format == CacheFormat::kRecord)
    return store_record<T>(x, record_at(p.cache, p.page_stride, p.block_size, slot));
  uint8_t* row = p.cache + slot / p.block_size * p.page_stride + slot % p.block_size * p.row_stride;
  if (p.format == CacheFormat::kBfloat16)
    store_row(x, reinterpret_cast<T*>(row));
  else
    store_row_e4m3(x, 1.0f / *p.kv_scale, row);
}

template <class T>
void query_row(const PrologueParams& p, int64_t token, int64_t head) {
  float x[kHeadDim];
  load_row(static_cast<const T*>(p.q) + token * p.q_token_stride + head * p.q_head_stride, x);
  const int64_t position = p.positions[token];
  const bool invalid = p.apply_q_rope && !p.position_ok(position);
  const float factor = invalid ? NAN : p.apply_q_norm ? inverse_rms(x, p.eps) : 1.0f;
  for (float& value : x) value *= factor;
  if (p.apply_q_rope && !invalid) rotate_row(x, p.cos_sin + position * kRopeDim);
  const int64_t offset = token * p.out_token_stride + head * p.out_head_stride;
  if (p.format == CacheFormat::kE4m3)
    store_row_e4m3(x, *p.q_scale_inv, static_cast<uint8_t*>(p.out) + offset);
  else
    store_row(x, static_cast<T*>(p.out) + offset);
}

template <class T>
void prologue(const PrologueParams& p) {
  parallel_for(0, p.tokens, 1 + 64 / (p.heads + 1), [&](int64_t begin, int64_t end) {
    for (int64_t token = begin; token < end; ++token) {
      insert_row<T>(p, token);
      for (int64_t head = 0; head < p.heads; ++head) query_row<T>(p, token, head);
      if (!p.zero_padding) continue;
      for (int64_t head = p.heads; head < p.padded_heads; ++head) {
        T* row = static_cast<T*>(p.out) + token * p.out_token_stride + head * p.out_head_stride;
        std::fill_n(row, kHeadDim, T(0.0f));
      }
    }
  });
}

template <class T>
void gather(const GatherParams& p) {
  parallel_for(0, p.rows, 64, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      T* out = static_cast<T*>(p.out) + row * p.out_stride;
      const int64_t slot = p.slots[row];
      if (slot < 0 || slot >= p.pages * p.block_size) {
        std::fill_n(out, kHeadDim, T(0.0f));
        continue;
      }
      const Record<const uint8_t> record = record_at(p.cache, p.page_stride, p.block_size, slot);
      for (int d = 0; d < kNopeDim; ++d)
        out[d] = static_cast<T>(e4m3_decode(record.data[d]) * ue8m0_decode(record.scales[d / kQuantBlock]));
      std::memcpy(out + kNopeDim, record.data + kNopeDim, kRopeDim * sizeof(T));
    }
  });
}

}  // namespace

void run_cpu(const PrologueParams& p) {
  dispatch_16_bit(p.dtype, [&](auto tag) { prologue<HostType<decltype(tag)>>(p); });
}

void run_cpu(const GatherParams& p) {
  dispatch_16_bit(p.dtype, [&](auto tag) { gather<HostType<decltype(tag)>>(p); });
}

ABIDING_KERNELS(abiding, CPU, mla_prologue, m) { Operators<CpuScope>::implement(m); }

}  // namespace abiding::mla_prologue
