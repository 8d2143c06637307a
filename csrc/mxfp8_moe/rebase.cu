// Rebasing: eight lanes walk along a weight row, a 16-byte vector of 128 of K each; first to find the row's code, then
// to move its bytes. A CTA has whole rows, so no atomics are needed for a report of the same bits.
#include "common/launch.cuh"
#include "mxfp8_moe/kernels.h"
#include "mxfp8_moe/quantizer.cuh"
#include "mxfp8_moe/rebase.h"

namespace abiding::mxfp8_moe {
namespace {

constexpr int kStepBytes = kScaleTileBlocks * kScaleBlock;  // of a row, whose codes are a word of its scale tile
constexpr int kLanes = kStepBytes / 16;                     // of a row
constexpr int kThreads = kRebaseRows * kLanes;              // of a CTA, which has the rows of one tally
constexpr int kUnroll = 4;                                  // vectors of a lane that are in flight at once
constexpr int kReportThreads = 256;

// The largest magnitude byte of 16, NaN aside.
__device__ __forceinline__ int largest_byte(const uint4& bytes) {
  const uint32_t words[4] = {bytes.x, bytes.y, bytes.z, bytes.w};
  uint32_t largest = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint32_t magnitudes = words[i] & 0x7F7F7F7F;
    largest = __vmaxu4(largest, magnitudes & ~__vcmpeq4(magnitudes, 0x7F7F7F7F));
  }
  largest = __vmaxu4(largest, largest >> 16);
  return static_cast<int>(__vmaxu4(largest, largest >> 8) & 0xFF);
}

// Moves 16 bytes down by `shift` powers of two. Adds the squares of the differences, in units of the scale before, to
// `error`, and those of the values to `norm`; NaN counts for neither.
template <bool kMoves>
__device__ __forceinline__ void rebase_vec16(uint4& bytes, int shift, float& error, float& norm, int& changed) {
  uint32_t* words = &bytes.x;
  const float down = pow2(-shift), up = pow2(shift);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    uint32_t moved = 0;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float2 x = decode_pair(words[i] >> 16 * half);
      norm += x.x == x.x ? x.x * x.x : 0;
      norm += x.y == x.y ? x.y * x.y : 0;
      if constexpr (!kMoves) continue;
      const uint32_t pair = e4m3x2_encode(x.x * down, x.y * down);
      moved |= pair << 16 * half;
      const float2 y = decode_pair(pair);
      const float first = fmaf(y.x, up, -x.x), second = fmaf(y.y, up, -x.y);
      if (first != 0 || second != 0) {  // of few elements, and NaN
        error += (first == first ? first * first : 0) + (second == second ? second * second : 0);
        changed += (first == first && first != 0) + (second == second && second != 0);
      }
    }
    if (kMoves) words[i] = moved;
  }
}

// A lane's part of a row.
struct RowPart {
  const uint8_t *from, *scales;
  int64_t k;
  int lane;

  __device__ bool exists(int step) const { return int64_t{step} * kStepBytes + lane * 16 < k; }
  __device__ uint4 bytes(int step) const {
    return exists(step) ? *reinterpret_cast<const uint4*>(from + int64_t{step} * kStepBytes) : uint4{};
  }
  __device__ uint32_t codes(int step) const {
    return *reinterpret_cast<const uint32_t*>(scales + int64_t{step} * kScaleTileBytes);
  }
};

// Calls body(step, bytes, codes) for each vector of the lane, of which kUnroll are loaded together.
template <class Body>
__device__ __forceinline__ void for_each_step(const RowPart& part, int steps, const Body& body) {
  for (int first = 0; first < steps; first += kUnroll) {
    uint4 bytes[kUnroll];
    uint32_t codes[kUnroll];
#pragma unroll
    for (int i = 0; i < kUnroll; ++i)
      if (first + i < steps) bytes[i] = part.bytes(first + i), codes[i] = part.codes(first + i);
#pragma unroll
    for (int i = 0; i < kUnroll; ++i)
      if (first + i < steps) body(first + i, bytes[i], codes[i]);
  }
}

__global__ void __launch_bounds__(kThreads, 3) rebase_kernel(const __grid_constant__ RebaseParams p) {
  __shared__ RebaseTally tallies[kRebaseRows];
  pdl_wait();
  pdl_launch_dependents();
  const int units_per_expert = static_cast<int>(p.padded_rows() / kRebaseRows);
  const int64_t expert = blockIdx.x / units_per_expert;
  const int lane = threadIdx.x % kLanes, block = lane / 2;
  const int64_t row = int64_t{blockIdx.x} % units_per_expert * kRebaseRows + threadIdx.x / kLanes;
  const int64_t columns = scale_columns(p.k),
                scales_at = expert * p.padded_rows() * columns + scale_at(row, 0, columns);
  // Rows of padding have codes alone.
  const RowPart part{p.weight + expert * p.expert_stride + row * p.stride + lane * 16, p.scales + scales_at,
                     row < p.n ? p.k : 0, lane};
  uint8_t* to = p.out + expert * p.out_expert_stride + row * p.out_stride + lane * 16;
  const int steps = static_cast<int>(columns / kScaleTileBlocks);

  RowCodes found;
  double error = 0, norm = 0;
  int changed = 0;
  const uint8_t first_code = code_of(part.codes(0), 0);
  for_each_step(part, steps, [&](int step, uint4& bytes, uint32_t codes) {
    const uint8_t code = code_of(codes, block);
    int largest = largest_byte(bytes);
    largest = max(largest, __shfl_xor_sync(~0u, largest, 1));
    if (!part.exists(step)) return;
    found.differ |= code != first_code;
    if (is_counted(code, largest)) {
      found.top = max(found.top, static_cast<int>(code));
      found.too_far = min(found.too_far, code_too_far(code, largest));
    }
    float squares = 0, squared_error = 0;
    rebase_vec16<false>(bytes, 0, squared_error, squares, changed);
    if (code != 255) norm += squares * square_scale(code);
  });
  int differ = found.differ;
#pragma unroll
  for (int step = 1; step < kLanes; step *= 2) {
    found.top = max(found.top, __shfl_xor_sync(~0u, found.top, step));
    found.too_far = min(found.too_far, __shfl_xor_sync(~0u, found.too_far, step));
    differ |= __shfl_xor_sync(~0u, differ, step);
  }
  found.differ = differ != 0;
  const bool moves = found.moves();
  const auto top = static_cast<uint8_t>(found.top);

  if (moves || p.out != p.weight || p.out_scales != p.scales)
    for_each_step(part, steps, [&](int step, uint4& bytes, uint32_t codes) {
      const uint8_t code = code_of(codes, block);
      if (part.exists(step)) {
        if (moves && code == 255) {
          bytes = {0x7F7F7F7F, 0x7F7F7F7F, 0x7F7F7F7F, 0x7F7F7F7F};
        } else if (moves && code != top) {
          float squares = 0, squared_error = 0;
          rebase_vec16<true>(bytes, rebase_shift(code, top), squared_error, squares, changed);
          if (squared_error != 0) error += squared_error * square_scale(code);
        }
        *reinterpret_cast<uint4*>(to + int64_t{step} * kStepBytes) = bytes;
      }
      const uint32_t mask = moves ? codes_mask(p.k / kScaleBlock - int64_t{step} * kScaleTileBlocks) : 0;
      if (lane == 0)
        *reinterpret_cast<uint32_t*>(p.out_scales + scales_at + int64_t{step} * kScaleTileBytes) =
            (codes & ~mask) | (same_codes(top) & mask);
    });

#pragma unroll
  for (int step = 1; step < kLanes; step *= 2) {
    error += __shfl_xor_sync(~0u, error, step);
    norm += __shfl_xor_sync(~0u, norm, step);
    changed += __shfl_xor_sync(~0u, changed, step);
  }
  if (lane == 0) tallies[threadIdx.x / kLanes] = tally_of_row(expert * p.n + row, error, norm, changed, found.stays());
  __syncthreads();
  if (threadIdx.x != 0) return;
  RebaseTally all = tallies[0];
  for (int i = 1; i < kRebaseRows; ++i) add(all, tallies[i]);
  p.tallies[blockIdx.x] = all;
}

// One CTA: each thread adds up a run of tallies, and the first thread those of all.
__global__ void __launch_bounds__(kReportThreads) report_kernel(const __grid_constant__ RebaseParams p) {
  __shared__ RebaseTally tallies[kReportThreads];
  pdl_wait();
  const int64_t units = p.units(), run = (units + kReportThreads - 1) / kReportThreads;
  RebaseTally tally{};
  for (int64_t i = 0; i < run && threadIdx.x * run + i < units; ++i) add(tally, p.tallies[threadIdx.x * run + i]);
  tallies[threadIdx.x] = tally;
  __syncthreads();
  if (threadIdx.x != 0) return;
  RebaseTally all{};
  for (const RebaseTally& one : tallies) add(all, one);
  write_report(p, all);
}

}  // namespace

cudaError_t run_cuda(const RebaseParams& p, cudaStream_t stream) {
  if (p.units() > 0) {
    const LaunchConfig config{static_cast<unsigned>(p.units()), kThreads};
    if (const cudaError_t status = launch(rebase_kernel, config, stream, p); status != cudaSuccess) return status;
  }
  return launch(report_kernel, LaunchConfig{1, kReportThreads}, stream, p);
}

}  // namespace abiding::mxfp8_moe
