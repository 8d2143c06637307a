// One warp per row of 512 values: lane l holds values [8l, 8l + 8) in Row::low and [256 + 8l, 256 + 8l + 8) in Row::high,
// so that each 16-byte access of the warp covers 512 contiguous bytes. Row::high of lanes 24..31 holds the RoPE values.
#include <cuda_runtime.h>

#include <type_traits>

#include "common/launch.cuh"
#include "common/vec16.cuh"
#include "mla_prologue/kernels.h"

namespace abiding::mla_prologue {
namespace {

constexpr int kMaxWarpsPerCta = 8;
constexpr int kHighOffset = kHeadDim / 2, kFirstRopeLane = 24;

// Few rows are spread over as many SMs as possible.
int warps_per_cta(int64_t rows) { return rows <= 600 ? 1 : kMaxWarpsPerCta; }

ABIDING_HD unsigned rows_per_token(const PrologueParams& p) {
  return 1 + static_cast<unsigned>(p.zero_padding ? p.padded_heads : p.heads);
}

struct Row {
  float low[8], high[8];
};

struct Angles {
  float cosine[4], sine[4];
};

__device__ __forceinline__ float4 load_floats(const float* from) {
  return __ldg(reinterpret_cast<const float4*>(from));
}

// Cosines and sines of the lane's four RoPE pairs; zeros in lanes without any.
__device__ __forceinline__ Angles load_angles(const PrologueParams& p, int64_t position, int lane) {
  Angles angles{};
  if (lane >= kFirstRopeLane) {
    const float* row = p.cos_sin + position * kRopeDim + 4 * (lane - kFirstRopeLane);
    const float4 cosine = load_floats(row), sine = load_floats(row + kRopeDim / 2);
    memcpy(angles.cosine, &cosine, 16);
    memcpy(angles.sine, &sine, 16);
  }
  return angles;
}

__device__ __forceinline__ void rotate_row(Row& row, const Angles& angles, int lane) {
  if (lane < kFirstRopeLane) return;
#pragma unroll
  for (int j = 0; j < 4; ++j) rotate(row.high[2 * j], row.high[2 * j + 1], angles.cosine[j], angles.sine[j]);
}

__device__ __forceinline__ uint4 load16(const void* from) { return *static_cast<const uint4*>(from); }

template <class T>
__device__ __forceinline__ Row unpack_row(const uint4& low, const uint4& high) {
  Row row;
  unpack<T>(low, row.low);
  unpack<T>(high, row.high);
  return row;
}

__device__ __forceinline__ float inverse_rms(const Row& row, float eps) {
  float sums[4] = {};  // four short dependency chains: a call of one token is bound by latency
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    sums[i % 2] = fmaf(row.low[i], row.low[i], sums[i % 2]);
    sums[2 + i % 2] = fmaf(row.high[i], row.high[i], sums[2 + i % 2]);
  }
  float sum = (sums[0] + sums[1]) + (sums[2] + sums[3]);
#pragma unroll
  for (int mask = 16; mask; mask /= 2) sum += __shfl_xor_sync(~0u, sum, mask);
  return rsqrtf(sum * (1.0f / kHeadDim) + eps);
}

__device__ __forceinline__ uint2 encode8(const float (&x)[8], float factor) {
  uint32_t pairs[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) pairs[i] = e4m3x2_encode(x[2 * i] * factor, x[2 * i + 1] * factor);
  return {pairs[0] | pairs[1] << 16, pairs[2] | pairs[3] << 16};
}

__device__ __forceinline__ void store_e4m3(const Row& row, float factor, uint8_t* to, int lane) {
  *reinterpret_cast<uint2*>(to + 8 * lane) = encode8(row.low, factor);
  *reinterpret_cast<uint2*>(to + kHighOffset + 8 * lane) = encode8(row.high, factor);
}

template <class T>
__device__ __forceinline__ void store_16_bit(const uint4& low, const uint4& high, T* to, int lane) {
  *reinterpret_cast<uint4*>(to + 8 * lane) = low;
  *reinterpret_cast<uint4*>(to + kHighOffset + 8 * lane) = high;
}

// Scale exponents of the lane's two quantization blocks; a quantization block is spread over 8 lanes.
__device__ __forceinline__ int2 quant_block_exponents(const Row& row) {
  float low = 0, high = 0;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    low = fmaxf(low, fabsf(row.low[i]));
    high = fmaxf(high, fabsf(row.high[i]));
  }
#pragma unroll
  for (int mask = 4; mask; mask /= 2) {
    low = fmaxf(low, __shfl_xor_sync(~0u, low, mask));
    high = fmaxf(high, __shfl_xor_sync(~0u, high, mask));
  }
  return {quant_block_exponent(low), quant_block_exponent(high)};
}

// Stores are 8 bytes wide: the checks guarantee no larger alignment of the cache.
__device__ __forceinline__ void store_record(const Row& row, int2 exponents, const uint4& rope, Record<uint8_t> record,
                                             int lane) {
  *reinterpret_cast<uint2*>(record.data + 8 * lane) = encode8(row.low, pow2(-exponents.x));
  if (lane < kFirstRopeLane) {
    *reinterpret_cast<uint2*>(record.data + kHighOffset + 8 * lane) = encode8(row.high, pow2(-exponents.y));
  } else {
    uint2* tail = reinterpret_cast<uint2*>(record.data + kNopeDim) + 2 * (lane - kFirstRopeLane);
    tail[0] = {rope.x, rope.y};
    tail[1] = {rope.z, rope.w};
  }
  if (lane % 8 == 0) {
    record.scales[lane / 8] = ue8m0_encode(exponents.x);
    record.scales[4 + lane / 8] = lane < kFirstRopeLane ? ue8m0_encode(exponents.y) : 0;
  }
}

// The row is loaded, and its amax reduced, before its slot is known to be valid: the two latencies overlap.
template <class T, CacheFormat kFormat>
__device__ __forceinline__ void insert_row(const PrologueParams& p, int64_t token, int lane) {
  const T* kv = static_cast<const T*>(p.kv) + token * p.kv_stride + 8 * lane;
  const int64_t slot = p.slot(token), position = p.positions[token];
  const uint4 low = load16(kv), high = load16(kv + kHighOffset);
  const bool valid = slot >= 0 && p.position_ok(position);
  Angles angles{};
  if (valid) angles = load_angles(p, position, lane);
  Row row = unpack_row<T>(low, high);
  const int2 exponents = quant_block_exponents(row);
  if (!valid) return;
  rotate_row(row, angles, lane);
  uint8_t* cache_row = p.cache + slot / p.block_size * p.page_stride + slot % p.block_size * p.row_stride;
  if constexpr (kFormat == CacheFormat::kE4m3) {
    store_e4m3(row, 1.0f / __ldg(p.kv_scale), cache_row, lane);
  } else {
    const uint4 rope = canonical_nans<T>(pack<T>(row.high));
    if constexpr (kFormat == CacheFormat::kBfloat16)
      store_16_bit(canonical_nans<T>(low), rope, reinterpret_cast<T*>(cache_row), lane);
    else
      store_record(row, exponents, rope, record_at(p.cache, p.page_stride, p.block_size, slot), lane);
  }
}

template <class T, CacheFormat kFormat>
__device__ __forceinline__ void query_row(const PrologueParams& p, int64_t token, int64_t head, int lane) {
  using Out = std::conditional_t<kFormat == CacheFormat::kE4m3, uint8_t, T>;
  const T* q = static_cast<const T*>(p.q) + token * p.q_token_stride + head * p.q_head_stride + 8 * lane;
  Out* out = static_cast<Out*>(p.out) + token * p.out_token_stride + head * p.out_head_stride;
  const int64_t position = p.positions[token];
  const uint4 low = load16(q), high = load16(q + kHighOffset);
  const bool rotated = p.apply_q_rope && p.position_ok(position);
  Angles angles{};
  if (rotated) angles = load_angles(p, position, lane);
  Row row = unpack_row<T>(low, high);
  const float factor = p.apply_q_rope && !rotated ? bits_float(0x7FC00000)
                       : p.apply_q_norm           ? inverse_rms(row, p.eps)
                                                  : 1.0f;
  if (rotated) rotate_row(row, angles, lane);
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    row.low[i] *= factor;
    row.high[i] *= factor;
  }
  if constexpr (kFormat == CacheFormat::kE4m3)
    store_e4m3(row, __ldg(p.q_scale_inv), out, lane);
  else
    store_16_bit(pack<T>(row.low), pack<T>(row.high), out, lane);
}

// The rows of a token: KV first, since its dependency chain is the longest, then the heads, then the padding heads.
//
// PDL: any input may come from the upstream kernel, so nothing is read before pdl_wait. Dependents are launched right
// after the wait; measured on an H100, launching them at the start, after the loads or at the end was slower.
template <class T, CacheFormat kFormat>
__global__ void __launch_bounds__(32 * kMaxWarpsPerCta) prologue_kernel(const __grid_constant__ PrologueParams p) {
  const int lane = threadIdx.x % 32;
  const unsigned token_rows = rows_per_token(p), row = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32;
  const int64_t token = row / token_rows, head = static_cast<int64_t>(row % token_rows) - 1;
  if (token >= p.tokens) return;
  pdl_wait();
  pdl_launch_dependents();
  if (head < 0) {
    insert_row<T, kFormat>(p, token, lane);
  } else if (head < p.heads) {
    query_row<T, kFormat>(p, token, head, lane);
  } else {
    T* out = static_cast<T*>(p.out) + token * p.out_token_stride + head * p.out_head_stride;
    store_16_bit({}, {}, out, lane);
  }
}

template <class T, CacheFormat kFormat>
cudaError_t launch_format(const PrologueParams& p, cudaStream_t stream) {
  const int64_t rows = p.tokens * rows_per_token(p);
  const int warps = warps_per_cta(rows);
  const unsigned ctas = static_cast<unsigned>((rows + warps - 1) / warps);
  return launch(prologue_kernel<T, kFormat>, LaunchConfig{ctas, static_cast<unsigned>(32 * warps)}, stream, p);
}

template <class T>
cudaError_t launch_dtype(const PrologueParams& p, cudaStream_t stream) {
  switch (p.format) {
    case CacheFormat::kRecord: return launch_format<T, CacheFormat::kRecord>(p, stream);
    case CacheFormat::kE4m3: return launch_format<T, CacheFormat::kE4m3>(p, stream);
    case CacheFormat::kBfloat16: break;
  }
  return launch_format<T, CacheFormat::kBfloat16>(p, stream);
}

}  // namespace

cudaError_t run_cuda(const PrologueParams& p, cudaStream_t stream) {
  return dispatch_16_bit(p.dtype, [&](auto tag) { return launch_dtype<CudaType<decltype(tag)>>(p, stream); });
}

}  // namespace abiding::mla_prologue
