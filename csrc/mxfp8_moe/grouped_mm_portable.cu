// The grouped GEMM for devices that have no implementation of their own. A CTA multiplies 64 tokens x 64 weight rows by
// mma.sync; both operands pass through shared memory as bf16, a scale block (32 of K) at a time.
#include "common/launch.cuh"
#include "common/vec16.cuh"
#include "mxfp8_moe/kernels.h"
#include "mxfp8_moe/quantizer.cuh"
#include "mxfp8_moe/tile_table.cuh"

namespace abiding::mxfp8_moe {
namespace {

constexpr int kThreads = 128, kBlockN = 64, kBlockM = 64;
constexpr int kPitch = kScaleBlock + 8;  // in elements: rows of 80 bytes, so that neighbors use other banks

// A thread's 16 elements of each operand, in registers on their way to shared memory.
struct Staged {
  uint4 tokens[2], weights;
  uint32_t code;
};

__device__ __forceinline__ void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

__device__ __forceinline__ uint32_t load_bf16x2(const __nv_bfloat16* at) {
  return *reinterpret_cast<const uint32_t*>(at);
}

// The epilogue: a sum is rounded once.
__device__ __forceinline__ void store_value(const GroupedMmParams& p, int64_t at, float value) {
  switch (p.out_dtype) {
    case DType::kBfloat16: static_cast<__nv_bfloat16*>(p.out)[at] = __float2bfloat16_rn(value); break;
    case DType::kFloat16: static_cast<__half*>(p.out)[at] = __float2half_rn(value); break;
    case DType::kFloat32: static_cast<float*>(p.out)[at] = value; break;
    default: break;
  }
}

__global__ void __launch_bounds__(kThreads) grouped_mm_kernel(GroupedMmParams p) {
  extern __shared__ int memory[];
  __shared__ __align__(16) __nv_bfloat16 tokens[kBlockN][kPitch], weights[kBlockM][kPitch];
  TileTable table(memory, p.groups.count);
  pdl_wait();
  pdl_launch_dependents();
  table.build<kThreads>(p.groups, kBlockN);
  const int m_tiles = static_cast<int>((p.n + kBlockM - 1) / kBlockM);
  const int64_t columns = scale_columns(p.k), expert_scale_bytes = round_up(p.n, kScaleTileRows) * columns;
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const int row = thread / 2, half = thread % 2;  // this thread stages 16 elements of one row of each operand

  const int64_t tiles = int64_t{table.first[p.groups.count]} * m_tiles;
  for (int64_t i = blockIdx.x; i < tiles; i += gridDim.x) {
    const int token_tile = static_cast<int>(i / m_tiles), expert = table.find(token_tile);
    const int first_token = (token_tile - table.first[expert]) * kBlockN;
    const int64_t first_row = i % m_tiles * kBlockM;
    const bool has_token = first_token + row < table.rows[expert], has_row = first_row + row < p.n;
    const auto* a = static_cast<const __nv_bfloat16*>(p.a) +
                    (int64_t{table.begin[expert]} + first_token + row) * p.a_stride + half * 16;
    const uint8_t* w = p.weight + expert * p.weight_expert_stride + (first_row + row) * p.weight_stride + half * 16;
    const uint8_t* scales = p.weight_scales + expert * expert_scale_bytes;
    const auto load = [&](int64_t block) {
      Staged s{};
      if (has_token) {
        s.tokens[0] = reinterpret_cast<const uint4*>(a + block * kScaleBlock)[0];
        s.tokens[1] = reinterpret_cast<const uint4*>(a + block * kScaleBlock)[1];
      }
      if (has_row) {
        s.weights = *reinterpret_cast<const uint4*>(w + block * kScaleBlock);
        s.code = scales[scale_at(first_row + row, block, columns)];
      }
      return s;
    };

    float d[8][4] = {};  // accumulators of the warp's 16 tokens x 64 weight rows
    Staged next = load(0);
    for (int64_t block = 0; block < p.k / kScaleBlock; ++block) {
      const Staged now = next;
      if (block + 1 < p.k / kScaleBlock) next = load(block + 1);
      __syncthreads();
      auto* to = reinterpret_cast<uint4*>(&tokens[row][half * 16]);
      to[0] = now.tokens[0];
      to[1] = now.tokens[1];
      auto* bf16 = reinterpret_cast<uint32_t*>(&weights[row][half * 16]);
      const uint32_t words[4] = {now.weights.x, now.weights.y, now.weights.z, now.weights.w};
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        bf16[2 * j] = dequantize_pair(words[j], now.code);
        bf16[2 * j + 1] = dequantize_pair(words[j] >> 16, now.code);
      }
      __syncthreads();
#pragma unroll
      for (int k = 0; k < kScaleBlock; k += 16) {
        const int column = k + lane % 4 * 2, from = warp * 16 + lane / 4;
        const uint32_t a_words[4] = {load_bf16x2(&tokens[from][column]), load_bf16x2(&tokens[from + 8][column]),
                                     load_bf16x2(&tokens[from][column + 8]),
                                     load_bf16x2(&tokens[from + 8][column + 8])};
#pragma unroll
        for (int n = 0; n < 8; ++n) {
          const __nv_bfloat16* b = &weights[n * 8 + lane / 4][column];
          const uint32_t b_words[2] = {load_bf16x2(b), load_bf16x2(b + 8)};
          mma_m16n8k16(d[n], a_words, b_words);
        }
      }
    }

#pragma unroll
    for (int n = 0; n < 8; ++n)
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int token = first_token + warp * 16 + lane / 4 + j / 2 * 8;
        const int64_t column = first_row + n * 8 + lane % 4 * 2 + j % 2;
        if (token < table.rows[expert] && column < p.n)
          store_value(p, (int64_t{table.begin[expert]} + token) * p.out_stride + column, d[n][j]);
      }
  }
}

cudaError_t run(const GroupedMmParams& p, cudaStream_t stream) {
  int sms = 0;
  const cudaError_t status = sm_count(&sms);
  if (status != cudaSuccess) return status;
  const LaunchConfig config{static_cast<unsigned>(sms) * 8, kThreads, TileTable::bytes(p.groups.count)};
  return launch(grouped_mm_kernel, config, stream, p);
}

}  // namespace

const GroupedMmImpl kGroupedMmPortable = [] {
  GroupedMmImpl impl{};
  impl.name = "portable";
  impl.row_format = RowFormat::kBf16;
  impl.supports = [](const GroupedMmParams&) { return true; };
  impl.run = run;
  return impl;
}();

}  // namespace abiding::mxfp8_moe
