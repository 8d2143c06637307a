// What the checks hand to a kernel: plain data, and the cache layout that host and device share. No torch here.
#pragma once

#include <cstdint>

#include "common/dtypes.h"
#include "common/indices.h"
#include "common/numerics.h"

namespace abiding::mla_prologue {

constexpr int kHeadDim = 512, kRopeDim = 64, kNopeDim = kHeadDim - kRopeDim;
constexpr int kQuantBlock = 64, kQuantBlocks = kNopeDim / kQuantBlock;
constexpr int kTokenBytes = kNopeDim + 2 * kRopeDim;      // 448 e4m3 values, then 64 RoPE values of 16 bits
constexpr int kScaleBytes = kQuantBlocks + 1;             // 7 UE8M0 codes and a zero
constexpr int kPayloadBytes = kTokenBytes + kScaleBytes;  // a token's share of a page
constexpr int kMinExponent = -22;                         // the scale of amax <= 1e-4

// How a KV row is stored, and with it how Q is: kMla is DeepSeek V4's 584-byte record, the others are whole rows.
enum class CacheFormat { kMla, kBfloat16, kE4m3 };

// Strides are in elements of 16 bits, those of the cache in bytes.
struct PrologueParams {
  int64_t tokens;
  int64_t heads, padded_heads;  // 0 heads where only KV is asked for
  const void* q;
  int64_t q_token_stride, q_head_stride;
  void* out;  // 16-bit values, or e4m3 in format kE4m3 (then strides in bytes)
  int64_t out_token_stride, out_head_stride;
  const void* kv;
  int64_t kv_stride;
  uint8_t* cache;
  int64_t pages, page_stride, row_stride, block_size;  // row_stride: of whole-row formats
  Indices slots, positions;
  const float* cos_sin;  // [max_position, 64]: 32 cosines, then 32 sines
  int64_t max_position;
  const float *kv_scale, *q_scale_inv;  // format kE4m3
  float eps;
  bool apply_q_norm, apply_q_rope, zero_padding;
  DType dtype;
  CacheFormat format;

  ABIDING_HD bool position_ok(int64_t position) const { return 0 <= position && position < max_position; }
  ABIDING_HD int64_t slot(int64_t token) const {  // negative: not inserted
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

// Where a page keeps token `slot`: values at `data`, scale codes at `scales`.
template <class Byte>
struct Record {
  Byte *data, *scales;
};

template <class Byte>
ABIDING_HD Record<Byte> record_at(Byte* cache, int64_t page_stride, int64_t block_size, int64_t slot) {
  Byte* page = cache + slot / block_size * page_stride;
  const int64_t i = slot % block_size;
  return {page + i * kTokenBytes, page + block_size * kTokenBytes + i * kScaleBytes};
}

// GPT-J interleaved rotation of one pair. The products' rounding is part of the contract: cache bytes depend on it.
ABIDING_HD void rotate(float& even, float& odd, float cosine, float sine) {
  const float e = even, o = odd;
  even = fmaf(e, cosine, -(o * sine));
  odd = fmaf(e, sine, o * cosine);
}

// The scale exponent of a 64-value block whose largest magnitude, NaN aside, is amax.
ABIDING_HD int block_exponent(float amax) {
  const int exponent = e4m3_scale_exponent(amax);
  return exponent > kMinExponent ? exponent : kMinExponent;
}

}  // namespace abiding::mla_prologue
