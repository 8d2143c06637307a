// The parameters of the kernels, and the cache layout and arithmetic that host and device share. No torch header here.
//
// Three things, three names: a quantization block is 64 values with one scale, `block_size` (vLLM's name) the number of
// tokens per cache page, and a block of threads is a CTA.
#pragma once

#include <cstdint>

#include "common/dtypes.h"
#include "common/indices.h"
#include "common/numerics.h"

namespace abiding::mla_prologue {

constexpr int kHeadDim = 512, kRopeDim = 64, kNopeDim = kHeadDim - kRopeDim;
constexpr int kQuantBlock = 64, kQuantBlocks = kNopeDim / kQuantBlock;
constexpr int kTokenDataBytes = kNopeDim + 2 * kRopeDim;          // 448 e4m3 values, then 64 RoPE values of 16 bits
constexpr int kTokenScaleBytes = kQuantBlocks + 1;                // 7 UE8M0 codes and a zero
constexpr int kRecordBytes = kTokenDataBytes + kTokenScaleBytes;  // one token in a cache page
constexpr int kMinExponent = -22;                                 // the scale exponent of amax <= 1e-4

// How KV rows are stored. kRecord is DeepSeek V4's 584-byte record (fp8_ds_mla in vLLM, MODEL1 in FlashMLA); the others
// are full caches, whose rows are 512 bfloat16 or e4m3 values. With kE4m3, Q is written as e4m3 too.
enum class CacheFormat { kRecord, kBfloat16, kE4m3 };

// Strides of q, out and kv are in elements, strides of the cache in bytes.
struct PrologueParams {
  int64_t tokens;
  int64_t heads, padded_heads;  // both 0 for the KV-only operator
  const void* q;
  int64_t q_token_stride, q_head_stride;
  void* out;  // e4m3 in format kE4m3, else values of `dtype`
  int64_t out_token_stride, out_head_stride;
  const void* kv;
  int64_t kv_stride;
  uint8_t* cache;
  int64_t pages, page_stride, row_stride, block_size;  // row_stride: full caches only
  Indices slots, positions;
  const float* cos_sin;  // [max_position, 64]: 32 cosines, then 32 sines
  int64_t max_position;
  const float *kv_scale, *q_scale_inv;  // format kE4m3 only
  float eps;
  bool apply_q_norm, apply_q_rope, zero_padding;
  DType dtype;
  CacheFormat format;

  ABIDING_HD bool position_ok(int64_t position) const { return 0 <= position && position < max_position; }
  ABIDING_HD int64_t slot(int64_t token) const {  // negative: skip the row
    const int64_t slot = token < slots.size ? slots[token] : -1;
    return slot < pages * block_size ? slot : -1;
  }
};

struct GatherParams {
  int64_t rows;
  const uint8_t* cache;
  int64_t pages, page_stride, block_size;
  Indices slots;
  void* out;
  int64_t out_stride;
  DType dtype;
};

// The record of one slot. A page holds the data of all its tokens first, then their scales.
template <class Byte>
struct Record {
  Byte *data, *scales;
};

template <class Byte>
ABIDING_HD Record<Byte> record_at(Byte* cache, int64_t page_stride, int64_t block_size, int64_t slot) {
  Byte* page = cache + slot / block_size * page_stride;
  const int64_t i = slot % block_size;
  return {page + i * kTokenDataBytes, page + block_size * kTokenDataBytes + i * kTokenScaleBytes};
}

// Interleaved (GPT-J style) RoPE of one pair. The FMA contraction is spelled out because cache bytes depend on it.
ABIDING_HD void rotate(float& even, float& odd, float cosine, float sine) {
  const float e = even, o = odd;
  even = fmaf(e, cosine, -(o * sine));
  odd = fmaf(e, sine, o * cosine);
}

// The scale exponent of a quantization block whose largest magnitude, ignoring NaN, is amax.
ABIDING_HD int quant_block_exponent(float amax) {
  const int exponent = e4m3_scale_exponent(amax);
  return exponent > kMinExponent ? exponent : kMinExponent;
}

}  // namespace abiding::mla_prologue
