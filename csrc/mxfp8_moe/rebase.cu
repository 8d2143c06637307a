// Rebasing: a warp takes a weight row and keeps its bytes and codes in shared memory, first to find the row's code and
// then to move the bytes. Memory is read once and written once, which leaves few instructions per byte; so what is rare
// (NaN, elements that lose bits) has paths of its own. Which rows a CTA has is fixed, so that a report needs no atomics
// and has the same bits again.
#include "common/copy_async.cuh"
#include "common/find_bad.cuh"
#include "common/launch.cuh"
#include "mxfp8_moe/kernels.h"
#include "mxfp8_moe/quantizer.cuh"
#include "mxfp8_moe/rebase.h"

namespace abiding::mxfp8_moe {
namespace {

constexpr int kWarps = kRebaseRows, kThreads = 32 * kWarps;  // of a CTA, which takes kRebaseRows rows at a time
constexpr int kCtasPerSm = 4;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 890
constexpr int kMinCtasPerSm = 2;  // to decode without an instruction for it takes more registers
#else
constexpr int kMinCtasPerSm = kCtasPerSm;
#endif
constexpr int kKeptVectors = 704;     // of a row: its first 11 KiB are kept, the rest is read twice
constexpr int kBytesInFlight = 2048;  // per warp: it loads several rows at once if they are short
constexpr int kRounds = 4;            // CTAs per CTA that fits on the GPU
constexpr int kSmemBytes = 96 << 10;  // at most; any GPU has that much for a CTA
constexpr int kReportThreads = 512;

// What shared memory keeps of each row: vectors of weights, and words of codes behind them.
struct RowMemory {
  int vectors, words;

  ABIDING_HD explicit RowMemory(int64_t k)
      : vectors(static_cast<int>(k / 16 < kKeptVectors ? k / 16 : kKeptVectors)), words((vectors + 7) / 8) {}
  ABIDING_HD constexpr int size() const { return vectors + (words + 3) / 4; }  // in vectors
  ABIDING_HD constexpr int rows_at_once() const {
    const int rows = kBytesInFlight / (vectors * 16);
    return rows < 1 ? 1 : rows < 8 ? rows : 8;
  }
};
static_assert(kWarps * (kKeptVectors + kKeptVectors / 32) * 16 <= kSmemBytes);

// The rows that the CTA takes together: two neighbors of each quarter of a scale tile, whose words of codes fill a
// sector of device memory.
struct Unit {
  static constexpr unsigned kPerTile = kScaleTileRows / kRebaseRows;
  unsigned expert, tile, in_tile;  // a tile of the expert, and a unit of the tile

  __device__ Unit(unsigned unit, unsigned tiles)
      : expert(unit / kPerTile / tiles), tile(unit / kPerTile % tiles), in_tile(unit % kPerTile) {}
  // To the next one, without a division, which for a short row would take as long as the rest.
  __device__ __forceinline__ void advance(unsigned tiles) {
    if (++in_tile < kPerTile) return;
    in_tile = 0;
    if (++tile == tiles) tile = 0, ++expert;
  }
  __device__ __forceinline__ int64_t row(int warp) const {
    return int64_t{tile} * kScaleTileRows + warp % 4 * 32 + in_tile * 2 + warp / 4;
  }
};

// A warp's row. Its lane i % 32 has vector i, and word i of the codes where they are copied.
struct RowPart {
  const uint4* from;
  const uint8_t* scales;  // the word of its first codes
  int vectors, words;     // of weights (rows of padding have none), and of codes
  uint4* memory;
  RowMemory kept;

  __device__ __forceinline__ uint32_t* kept_words() const { return reinterpret_cast<uint32_t*>(memory + kept.vectors); }
  __device__ __forceinline__ const uint32_t* word_at(int word) const {
    return reinterpret_cast<const uint32_t*>(scales + int64_t{word} * kScaleTileBytes);
  }
  __device__ __forceinline__ void load(int lane) const {
    for (int i = lane; i < min(vectors, kept.vectors); i += 32) copy_async(memory + i, from + i);
    for (int i = lane; i < min(words, kept.words); i += 32) copy_async<uint32_t>(kept_words() + i, word_at(i));
  }
  __device__ __forceinline__ uint4 bytes(int vector) const {
    return vector < kept.vectors ? memory[vector] : from[vector];
  }
  __device__ __forceinline__ uint32_t codes(int word) const {
    return word < kept.words ? kept_words()[word] : *word_at(word);
  }
  // The code of a vector, which is half of a scale block.
  __device__ __forceinline__ uint8_t code(int vector) const { return code_of(codes(vector / 8), vector % 8 / 2); }
};

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
    for (const uint32_t word : words)
      for (int i = 0; i < 4; ++i) {
        const float x = e4m3_decode(static_cast<uint8_t>(word >> 8 * i));
        if (x == x) found.squares += x * x;
      }
  }
  return found;
}

// The magnitude byte of a float16 that is an e4m3 value, of its exponent and of being zero: 1 stands for all subnormal
// ones, as rebase.h does not tell them apart.
__device__ __forceinline__ int magnitude_byte(uint32_t half) {
  return max(static_cast<int>(half >> 7) - (8 << 3), half != 0);
}

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
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const bool all_normal = (((words[i] | kHigh) - least) & kHigh) == kHigh;
    if (all_normal && !has_nan)
      words[i] -= less;
    else if ((words[i] & ~kHigh) != 0)  // zeros stay
      words[i] = move_rounded(words[i], shift, loss);
  }
  return bytes;
}

template <class T>
__device__ __forceinline__ T sum_of_warp(T x) {
#pragma unroll
  for (int step = 1; step < 32; step *= 2) x += __shfl_xor_sync(~0u, x, step);
  return x;
}

// Adds row `index` to the lane's tally: the lane's own part of sums, and what all lanes know of the worst row and of
// rows that stay.
__device__ __forceinline__ void rebase_row(const RowPart& part, int64_t index, int64_t k, bool in_place, uint4* to,
                                           uint8_t* out_scales, RebaseTally& tally) {
  const int lane = threadIdx.x % 32;
  RowCodes found;
  double error = 0, norm = 0;
  Loss loss;
  bool has_nan = false;
  const uint8_t first_code = part.code(0);
  for (int i = lane; i < part.vectors; i += 32) {  // neighboring lanes, which have a scale block, stay together
    const uint8_t code = part.code(i);
    const uint4 bytes = part.bytes(i);
    const Magnitudes its = magnitudes_of(bytes);
    const int largest = magnitude_byte(max(its.largest, __shfl_xor_sync(3u << (lane & ~1), its.largest, 1)));
    has_nan |= its.has_nan;
    found.differ |= code != first_code;
    if (is_counted(code, largest)) {
      found.top = max(found.top, static_cast<int>(code));
      found.too_far = min(found.too_far, code_too_far(code, largest));
    }
    if (code != 255) norm += its.squares * square_scale(code);
  }
  __syncwarp();
  found.top = __reduce_max_sync(~0u, found.top);
  found.too_far = __reduce_min_sync(~0u, found.too_far);
  found.differ = __any_sync(~0u, found.differ);
  const bool moves = found.moves();
  const auto top = static_cast<uint8_t>(found.top);

  if (moves) {
    for (int i = lane; i < part.vectors; i += 32) {
      const uint8_t code = part.code(i);
      uint4 bytes = part.bytes(i);
      if (code == 255) {
        bytes = {0x7F7F7F7F, 0x7F7F7F7F, 0x7F7F7F7F, 0x7F7F7F7F};
      } else if (code != top) {
        loss.error = 0;
        bytes = move_vec16(bytes, rebase_shift(code, top), has_nan, loss);
        if (loss.error != 0) error += loss.error * square_scale(code);
      }
      to[i] = bytes;
    }
  } else if (!in_place) {
    for (int i = lane; i < part.vectors; i += 32) to[i] = part.bytes(i);
  }
  if (moves || !in_place)
    for (int i = lane; i < part.words; i += 32) {
      const uint32_t mask = moves ? codes_mask(k / kScaleBlock - int64_t{i} * kScaleTileBlocks) : 0;
      *reinterpret_cast<uint32_t*>(out_scales + int64_t{i} * kScaleTileBytes) =
          (part.codes(i) & ~mask) | (same_codes(top) & mask);
    }

  RebaseTally mine{error, norm, 0, index, loss.changed, found.stays()};
  if (__any_sync(~0u, loss.changed != 0))
    mine.worst = tally_of_row(index, sum_of_warp(error), sum_of_warp(norm), 0, false).worst;
  add(tally, mine);
}

__global__ void __launch_bounds__(kThreads, kMinCtasPerSm) rebase_kernel(const __grid_constant__ RebaseParams p) {
  extern __shared__ uint4 memory[];
  __shared__ RebaseTally tallies[kWarps];
  pdl_wait();
  pdl_launch_dependents();
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const RowMemory kept(p.k);
  const int at_once = kept.rows_at_once();
  const int64_t columns = scale_columns(p.k);
  const bool in_place = p.out == p.weight && p.out_scales == p.scales;
  const auto tiles_per_expert = static_cast<unsigned>(p.padded_rows() / kScaleTileRows);
  const auto unit_at = [&](unsigned cta) { return static_cast<unsigned>(p.units() * cta / gridDim.x); };
  const unsigned end = unit_at(blockIdx.x + 1);
  const auto part_of = [&](const Unit& unit, int slot) {
    const int64_t row = unit.row(warp);
    return RowPart{reinterpret_cast<const uint4*>(p.weight + unit.expert * p.expert_stride + row * p.stride),
                   p.scales + unit.expert * p.padded_rows() * columns + scale_at(row, 0, columns),
                   row < p.n ? static_cast<int>(p.k / 16) : 0,
                   static_cast<int>(columns / kScaleTileBlocks),
                   memory + (warp * at_once + slot) * kept.size(),
                   kept};
  };
  RebaseTally tally{};
  Unit loaded(unit_at(blockIdx.x), tiles_per_expert), at = loaded;
  for (unsigned first = unit_at(blockIdx.x); first < end; first += at_once) {
    const int count = static_cast<int>(min(end - first, static_cast<unsigned>(at_once)));
    for (int i = 0; i < count; ++i, loaded.advance(tiles_per_expert)) part_of(loaded, i).load(lane);
    wait_for_copies();
    __syncwarp();  // lanes read one another's codes
    for (int i = 0; i < count; ++i, at.advance(tiles_per_expert)) {
      const RowPart part = part_of(at, i);
      const int64_t row = at.row(warp);
      uint8_t* to = p.out + at.expert * p.out_expert_stride + row * p.out_stride;
      rebase_row(part, at.expert * p.n + row, p.k, in_place, reinterpret_cast<uint4*>(to),
                 p.out_scales + (part.scales - p.scales), tally);
    }
    __syncwarp();  // before the next rows come
  }
  tally.error = sum_of_warp(tally.error);
  tally.norm = sum_of_warp(tally.norm);
  tally.changed = sum_of_warp(tally.changed);
  if (lane == 0) tallies[warp] = tally;
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (int i = 1; i < kWarps; ++i) add(tally, tallies[i]);
  p.tallies[blockIdx.x] = tally;
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
  const int64_t most = int64_t{sms} * kCtasPerSm * kRounds;
  const auto ctas = static_cast<unsigned>(p.units() < most ? p.units() : most);
  if (ctas > 0) {
    const RowMemory kept(p.k);
    const auto smem_bytes = static_cast<size_t>(kWarps * kept.rows_at_once() * kept.size() * 16);
    const LaunchConfig config = with_max_smem({ctas, kThreads, smem_bytes});  // for kCtasPerSm of them
    // The same value in every call: the limit is the kernel's, and another thread may set it before the launch.
    if (const cudaError_t status =
            cudaFuncSetAttribute(rebase_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSmemBytes);
        status != cudaSuccess)
      return status;
    if (const cudaError_t status = launch(rebase_kernel, config, stream, p); status != cudaSuccess) return status;
  }
  return launch(report_kernel, LaunchConfig{1, kReportThreads}, stream, p, static_cast<int>(ctas));
}

}  // namespace abiding::mxfp8_moe
