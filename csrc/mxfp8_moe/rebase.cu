// Rebasing: the lanes of a row look at its bytes, first to find the row's code and then to move the bytes. What they
// cannot keep in registers they read a second time, while the L1 has it. Instructions are what limits it; so what is
// rare (NaN, elements that lose bits) has paths of its own. Which rows a CTA has is fixed, so that a report needs no
// atomics and has the same bits again.
#include <algorithm>

#include "common/find_bad.cuh"
#include "common/launch.cuh"
#include "mxfp8_moe/kernels.h"
#include "mxfp8_moe/quantizer.cuh"
#include "mxfp8_moe/rebase.h"

namespace abiding::mxfp8_moe {
namespace {

constexpr int kThreads = 256, kReportThreads = 512;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 890
constexpr int kMinCtasPerSm = 2;  // to decode without an instruction for it takes more registers
#else
constexpr int kMinCtasPerSm = 4;
#endif
constexpr int kCtas = 32;  // per SM: more than it holds, so that it always has as many
constexpr int kKept = 4;   // vectors of 16 bytes that a lane keeps

// Of 16 values, NaN aside: the sum of their squares, and the largest magnitude as the bits of a float16.
struct Magnitudes {
  float squares;
  uint32_t largest;
  bool has_nan;
};
__device__ __forceinline__ Magnitudes magnitudes_of(const uint4& bytes) {
  const uint32_t words[4] = {bytes.x, bytes.y, bytes.z, bytes.w};
  __half2 top = __float2half2_rn(0);
  float even = 0, odd = 0;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const __half2 pair = decode_halves(words[i / 2] >> 16 * (i % 2));
    top = __hmax2(top, __habs2(pair));  // of NaN and a number it is the number
    const float2 x = __half22float2(pair);
    even = fmaf(x.x, x.x, even);
    odd = fmaf(x.y, x.y, odd);
  }
  uint32_t bits;
  memcpy(&bits, &top, 4);
  Magnitudes found{even + odd, max(bits & 0xFFFF, bits >> 16), false};
  if (found.squares != found.squares) {
    found = {0, found.largest, true};
#pragma unroll 1
    for (const uint32_t word : words)
#pragma unroll 1
      for (int i = 0; i < 4; ++i) {
        const float x = e4m3_decode(static_cast<uint8_t>(word >> 8 * i));
        if (x == x) found.squares += x * x;
      }
  }
  return found;
}

// e4m3's exponent field of a value in float16, or 1 for a subnormal one.
__device__ __forceinline__ int exponent_field(uint32_t half) { return max(static_cast<int>(half >> 10), 9) - 8; }

// What moving has done to a lane's elements: the sum of the squares of the differences, in units of the scale before,
// and the number of elements whose value changed.
struct Loss {
  float error = 0;
  int changed = 0;
};

// Moves 4 bytes down by `shift` powers of two. NaN stays, and does not count as changed.
__device__ __forceinline__ uint32_t move_rounded(uint32_t word, int shift, Loss& loss) {
  uint32_t moved = 0;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float2 x = decode_pair(word >> 16 * half);
    const uint32_t pair = e4m3x2_encode(x.x * pow2(-shift), x.y * pow2(-shift));
    moved |= pair << 16 * half;
    const float2 y = decode_pair(pair);
    const float first = fmaf(y.x, pow2(shift), -x.x), second = fmaf(y.y, pow2(shift), -x.y);
    loss.error += (first == first ? first * first : 0) + (second == second ? second * second : 0);
    loss.changed += (first == first && first != 0) + (second == second && second != 0);
  }
  return moved;
}

// The same of 16 bytes. Elements that stay normal lose nothing: `shift` comes off their exponents, for the four bytes
// of a word at once.
__device__ __forceinline__ uint4 move_vec16(uint4 bytes, int shift, bool has_nan, Loss& loss) {
  constexpr uint32_t kOnes = 0x01010101, kHigh = 0x80 * kOnes;
  const uint32_t less = 8 * shift * kOnes, least = less + 8 * kOnes;  // that much is at most 0x80 per byte
  uint32_t* words = &bytes.x;
  uint32_t normal = kHigh;
#pragma unroll
  for (int i = 0; i < 4; ++i) normal &= (words[i] | kHigh) - least;
  if (normal == kHigh && !has_nan) {
#pragma unroll
    for (int i = 0; i < 4; ++i) words[i] -= less;
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) words[i] = move_rounded(words[i], shift, loss);
  }
  return bytes;
}

// Adds up the tallies of a warp's lanes; lane 0 has the sum.
__device__ __forceinline__ RebaseTally add_up(RebaseTally tally) {
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    RebaseTally other;
    other.error = __shfl_down_sync(~0u, tally.error, step);
    other.norm = __shfl_down_sync(~0u, tally.norm, step);
    other.worst = __shfl_down_sync(~0u, tally.worst, step);
    other.worst_row = __shfl_down_sync(~0u, tally.worst_row, step);
    other.changed = __shfl_down_sync(~0u, tally.changed, step);
    other.left = __shfl_down_sync(~0u, tally.left, step);
    if (static_cast<int>(threadIdx.x % 32) + step < 32) add(tally, other);
  }
  return tally;
}

// A row, as one of its kLanes lanes sees it: it has vectors lane, lane + kLanes, ... and keeps kKept of them at a time,
// with the words of codes that they belong to. kLanes is at least 8: all vectors of a lane have the same place in their
// words.
template <int kLanes>
struct RowLane {
  static constexpr unsigned kStep = kLanes * kKept;  // vectors that the row's lanes keep
  static __device__ __forceinline__ unsigned lane() { return threadIdx.x % kLanes; }

  const uint4* from;
  const uint8_t* scales;    // the word of its first codes
  unsigned vectors, words;  // of weights (rows of padding have none), and of codes
  uint4 bytes[kKept];
  uint32_t codes[kKept];

  // Words beyond the last vector, in rows of padding, are loaded too.
  __device__ __forceinline__ void load(unsigned first) {
#pragma unroll
    for (int i = 0; i < kKept; ++i) {
      const unsigned vector = first + i * kLanes + lane();
      bytes[i] = vector < vectors ? from[vector] : uint4{};
      codes[i] = vector / 8 < words ? *reinterpret_cast<const uint32_t*>(scales + vector / 8 * kScaleTileBytes) : 0;
    }
  }
  // A vector is half of a scale block.
  __device__ __forceinline__ uint8_t code(int i) const {
    return static_cast<uint8_t>(__byte_perm(codes[i], 0, 0x4440 + lane() % 8 / 2));
  }
};

// What is known of a row's codes, in half words of which the largest counts, so that lanes exchange two at once.
struct PackedCodes {
  uint32_t counted = 0;  // RowCodes::top, and 511 - RowCodes::too_far
  uint32_t all = 0;      // the largest code, and 255 less the smallest

  // `largest` is the block's largest magnitude in float16.
  __device__ __forceinline__ void add(uint8_t code, uint32_t largest) {
    if (is_counted(code, largest != 0))
      counted = __vmaxu2(counted, code + ((511 - code_too_far(code, exponent_field(largest))) << 16));
    all = __vmaxu2(all, code + ((255 - code) << 16));
  }
  __device__ __forceinline__ void add(const PackedCodes& other) {
    counted = __vmaxu2(counted, other.counted);
    all = __vmaxu2(all, other.all);
  }
  __device__ __forceinline__ RowCodes unpacked() const {
    return {static_cast<int>(counted & 0xFFFF), 511 - static_cast<int>(counted >> 16),
            (all & 0xFFFF) + (all >> 16) > 255};
  }
};

// Looks at what lanes keep: which codes count, and the sum of squares. All lanes of a warp call this together.
template <int kLanes>
__device__ __forceinline__ void examine(const RowLane<kLanes>& row, unsigned first, PackedCodes& found, double& norm,
                                        bool& has_nan) {
#pragma unroll
  for (int i = 0; i < kKept; ++i) {
    const Magnitudes its = magnitudes_of(row.bytes[i]);
    const uint32_t largest = max(its.largest, __shfl_xor_sync(~0u, its.largest, 1));
    if (first + i * kLanes + row.lane() >= row.vectors) continue;
    const uint8_t code = row.code(i);
    has_nan |= its.has_nan;
    found.add(code, largest);
    if (code != 255) norm += its.squares * square_scale(code);
  }
}

// Writes what lanes keep, and counts what has changed.
template <int kLanes>
__device__ __forceinline__ void write(const RebaseParams& p, RowLane<kLanes>& row, unsigned first,
                                      const RowCodes& found, bool has_nan, uint4* to, uint8_t* out_scales,
                                      double& error, int& changed) {
  const auto top = static_cast<uint8_t>(found.top);
  const bool moves = found.moves();
#pragma unroll
  for (int i = 0; i < kKept; ++i) {
    const unsigned vector = first + i * kLanes + row.lane(), word = vector / 8;
    if (row.lane() % 8 == 0 && word < row.words) {
      const uint32_t mask = moves ? codes_mask(p.k / kScaleBlock - int64_t{word} * kScaleTileBlocks) : 0;
      *reinterpret_cast<uint32_t*>(out_scales + word * kScaleTileBytes) =
          (row.codes[i] & ~mask) | (same_codes(top) & mask);
    }
    if (vector >= row.vectors) continue;
    const uint8_t code = row.code(i);
    if (moves && code != top) {
      if (code == 255) {
        row.bytes[i] = {0x7F7F7F7F, 0x7F7F7F7F, 0x7F7F7F7F, 0x7F7F7F7F};
      } else {
        Loss loss;
        row.bytes[i] = move_vec16(row.bytes[i], rebase_shift(code, top), has_nan, loss);
        if (loss.error != 0) error += loss.error * square_scale(code);
        changed += loss.changed;
      }
    }
    to[vector] = row.bytes[i];
  }
}

template <int kLanes, class T>
__device__ __forceinline__ T sum_of_row(T x) {
#pragma unroll
  for (int step = 1; step < kLanes; step *= 2) x += __shfl_xor_sync(~0u, x, step);
  return x;
}

// Grid x is the expert.
template <int kLanes>
__global__ void __launch_bounds__(kThreads, kMinCtasPerSm) rebase_kernel(const __grid_constant__ RebaseParams p) {
  __shared__ RebaseTally tallies[kThreads / 32];
  pdl_wait();
  pdl_launch_dependents();
  constexpr unsigned kAtOnce = kThreads / kLanes;
  static_assert(kAtOnce >= kRebaseRows);  // there is a tally for as many rows
  const auto vectors = static_cast<unsigned>(p.k / 16), padded_rows = static_cast<unsigned>(p.padded_rows());
  const int64_t expert = blockIdx.x, columns = scale_columns(p.k), expert_scales = expert * padded_rows * columns;
  const auto words = static_cast<unsigned>(columns / kScaleTileBlocks);
  const uint8_t* const weight = p.weight + expert * p.expert_stride;
  const uint8_t* const scales = p.scales + expert_scales;
  const bool in_place = p.out == p.weight && p.out_scales == p.scales;
  double all_errors = 0, all_norms = 0, worst = 0;
  int all_changed = 0, left = 0;
  unsigned worst_row = 0;
  for (unsigned first_row = blockIdx.y * kAtOnce; first_row < padded_rows; first_row += gridDim.y * kAtOnce) {
    // Eight rows at once are two neighbors of each quarter of a scale tile: the words of their codes fill a sector.
    const unsigned number = first_row + threadIdx.x / kLanes, in_tile = number % kScaleTileRows;
    const unsigned line = in_tile / 8 * 2 + in_tile % 8 / 4, quarter = in_tile % 4;
    const unsigned index = number - in_tile + quarter * 32 + line;
    const int64_t scale = int64_t{number / kScaleTileRows * words} * kScaleTileBytes + line * 16 + quarter * 4;
    RowLane<kLanes> row;
    row.from = reinterpret_cast<const uint4*>(weight + index * p.stride);
    row.scales = scales + scale;
    row.vectors = index < p.n ? vectors : 0;
    row.words = number < padded_rows ? words : 0;  // lanes stay together behind the last row, too
    PackedCodes packed;
    double error = 0, norm = 0;
    int changed = 0;
    bool has_nan = false;
    for (unsigned first = 0; first < vectors; first += row.kStep) {
      row.load(first);
      examine(row, first, packed, norm, has_nan);
    }
#pragma unroll
    for (int step = 1; step < kLanes; step *= 2)
      packed.add({__shfl_xor_sync(~0u, packed.counted, step), __shfl_xor_sync(~0u, packed.all, step)});
    const RowCodes found = packed.unpacked();

    if (found.moves() || !in_place) {
      auto* const to = reinterpret_cast<uint4*>(p.out + expert * p.out_expert_stride + index * p.out_stride);
      uint8_t* const out_scales = p.out_scales + expert_scales + scale;
      for (unsigned first = 0; first < vectors; first += row.kStep) {
        if (vectors > row.kStep) {  // the row is a warp's
          row.load(first);
          __syncwarp();  // all lanes have read the codes that one of them writes
        }
        write(p, row, first, found, has_nan, to, out_scales, error, changed);
      }
    }
    all_norms += norm;
    left += row.lane() == 0 && found.stays();
    if (__any_sync(~0u, changed)) {
      all_errors += error;
      all_changed += changed;
      const double its = tally_of_row(0, sum_of_row<kLanes>(error), sum_of_row<kLanes>(norm), 0, false).worst;
      if (its > worst || (its == worst && index < worst_row)) worst = its, worst_row = index;
    }
  }
  RebaseTally tally{all_errors, all_norms, worst, expert * p.n + worst_row, all_changed, left};
  tally = add_up(tally);
  if (threadIdx.x % 32 == 0) tallies[threadIdx.x / 32] = tally;
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (int i = 1; i < kThreads / 32; ++i) add(tally, tallies[i]);
  p.tallies[blockIdx.x * gridDim.y + blockIdx.y] = tally;
}

// One CTA adds up the tallies of `ctas` CTAs.
__global__ void __launch_bounds__(kReportThreads) report_kernel(const __grid_constant__ RebaseParams p, int ctas) {
  __shared__ RebaseTally tallies[kReportThreads / 32];
  pdl_wait();
  RebaseTally tally{};
#pragma unroll 4
  for (int i = threadIdx.x; i < ctas; i += kReportThreads) add(tally, p.tallies[i]);
  tally = add_up(tally);
  if (threadIdx.x % 32 == 0) tallies[threadIdx.x / 32] = tally;
  __syncthreads();
  if (threadIdx.x >= 32) return;
  tally = add_up(threadIdx.x < kReportThreads / 32 ? tallies[threadIdx.x] : RebaseTally{});
  if (threadIdx.x == 0) write_report(p, tally);
}

}  // namespace

cudaError_t find_first_bad(const RowCodesRule& rule, int64_t* result, cudaStream_t stream) {
  return launch_find_bad(rule, result, stream);
}

cudaError_t run_cuda(const RebaseParams& p, cudaStream_t stream) {
  int sms = 0;
  if (const cudaError_t status = sm_count(&sms); status != cudaSuccess) return status;
  const int lanes = p.k <= 8 * kKept * 16 ? 8 : p.k <= 16 * kKept * 16 ? 16 : 32;  // the least that keep a row
  const auto kernel = lanes == 8 ? rebase_kernel<8> : lanes == 16 ? rebase_kernel<16> : rebase_kernel<32>;
  const int64_t at_once = kThreads / lanes, work = (p.padded_rows() + at_once - 1) / at_once;
  const int64_t of_expert = p.experts > 0 ? std::clamp<int64_t>(int64_t{sms} * kCtas / p.experts, 1, work) : 0;
  if (of_expert > 0) {
    LaunchConfig config{static_cast<unsigned>(p.experts), kThreads};
    config.grid_y = static_cast<unsigned>(of_expert);
    if (const cudaError_t status = launch(kernel, config, stream, p); status != cudaSuccess) return status;
  }
  return launch(report_kernel, LaunchConfig{1, kReportThreads}, stream, p, static_cast<int>(of_expert * p.experts));
}

}  // namespace abiding::mxfp8_moe
