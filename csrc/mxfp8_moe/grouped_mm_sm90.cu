// The grouped product on Hopper. Weights are what a warpgroup multiplies from registers: it reads their bytes from shared
// memory, makes bf16 of them with their scales in it, and multiplies tokens, which opaque in shared memory. So a tile is 128 or
// 256 weight rows x N tokens, N as wide as the tokens of an expert ask for.
//
// A block is a warpgroup that copies tiles, and two or four that own 64 weight rows each. It takes tiles until none is left.
// What the latter do between two multiplications is what tiles of many tokens wait for, so the former makes scales for them.
#include "common/launch.cuh"
#include "common/sm90.cuh"
#include "common/vec16.cuh"
#include "mxfp8_moe/kernels.h"
#include "mxfp8_moe/plan.h"
#include "mxfp8_moe/tiles.cuh"
#include "mxfp8_moe/wgmma.cuh"

namespace abiding::mxfp8_moe {
namespace {

using namespace sm90;

// kPairs: two blocks of a cluster take neighbouring weight rows and copy half of the tokens each, to both.
// kSplit: the blocks of a cluster take parts of K, and add up in their order.
enum class Cluster { kAlone, kPairs, kSplit };

// Of weights, that a block asks for before earlier grids have ended: more would be in the way of what those still read.
constexpr int kEarlyStages = 2;

// K is copied kDepth at a time, and multiplied in two halves of that.
template <bool kInterleaved_, TileKind kKind_, int kConsumers_, int kDepth_, int kStages_, Cluster kCluster_,
          int kResident_ = 1>
struct Config {
  static constexpr bool kInterleaved = kInterleaved_;  // the tokens' rows (params.h)
  static constexpr TileKind kKind = kKind_;
  static constexpr int kConsumers = kConsumers_, kDepth = kDepth_, kStages = kStages_;
  static constexpr Cluster kCluster = kCluster_;
  static constexpr int kResident = kResident_;  // blocks of a multiprocessor
  static constexpr int kConsumerThreads = 128 * kConsumers, kThreads = kConsumerThreads + 128;
  // Of a thread. What all start with, in eights, is shared out again.
  static constexpr int kRegisters = 65536 / (kThreads * kResident) / 8 * 8;
  static constexpr int kProducerRegisters = kRegisters > 128 ? 40 : 32;
  static constexpr int kConsumerRegisters = (kThreads * kRegisters - 128 * kProducerRegisters) / kConsumerThreads;
  static_assert(kConsumerRegisters % 8 == 0);
  static constexpr int kTokens = tokens_of(kKind), kBox = box_of(kTokens);
  static constexpr int kRows = 64 * kConsumers;  // weight rows of a tile
  static_assert(kRows % kTileRows == 0);
  static constexpr int kScaleTiles = kRows / kTileRows;
  static constexpr int kSteps = kDepth / 32;  // of a half: wgmma takes 16 of K
  // Two scales of a row fit where its four codes were: the copying warpgroup's spare warps make them, one for 128 rows.
  static constexpr bool kReady = kDepth / kBlock == 2;
  static_assert(!kReady || (kScaleTiles <= 3 && kCluster_ != Cluster::kSplit));
  static constexpr uint32_t kWeightBytes = kRows * kDepth, kTokenBytes = kTokens * 128;
  static constexpr uint32_t kStageBytes = kWeightBytes + kDepth / 64 * kTokenBytes;
  static constexpr uint32_t kScaleBytes = kScaleTiles * kTileBytes;
  static constexpr int kExchanges = kCluster == Cluster::kSplit ? 2 : 0;
  static constexpr uint32_t kExchangeBytes = kRows * kTokens * 4;
  static constexpr uint32_t kStagingBytes = kCluster == Cluster::kSplit ? 0 : 16 * 80;  // a warp's
};

// Shared memory, from a 1024-byte boundary.
template <class C>
struct Layout {
  static constexpr uint32_t kScales = C::kStages * C::kStageBytes;
  static constexpr uint32_t kExchange = kScales + C::kStages * C::kScaleBytes;
  static constexpr uint32_t kStaging = kExchange + C::kExchanges * C::kExchangeBytes;
  static constexpr uint32_t kBarriers = kStaging + C::kConsumerThreads / 32 * C::kStagingBytes;
  static constexpr uint32_t kTable = kBarriers + (3 * C::kStages + 2) * 8;
  static constexpr uint32_t bytes(int64_t experts) { return 1024 + kTable + TileTable::bytes(experts); }
};

struct Arguments {
  GroupedMmParams p;
  int64_t scale_columns, scale_expert_bytes;
  int row_tiles;    // weight tiles of an expert that a cluster goes through
  int splits;       // blocks that share K
  int split_depth;  // how many kDepth of it each has
  int depth;        // how many there are
  int blocks;       // of 32 in K
};

// A tile: some weight rows of an expert, and some of its tokens.
struct Tile {
  int expert, row_tile, begin;
  int tokens;  // that exist, at most `width`
  int width;

  // All lanes of a warp. Tiles of the same weight rows come one after the other.
  template <int kBox>
  static __device__ __forceinline__ Tile find(const TileTable& table, int index, int row_tiles) {
    const int expert = table.find(index / row_tiles);
    const int local = index - table.first[expert] * row_tiles, all = table.first[expert + 1] - table.first[expert];
    const int row_tile = local / all, tokens = table.rows[expert];
    const Share share = share_of(tokens, kBox, all, local - row_tile * all);
    return {expert, row_tile, table.begin[expert] + share.begin, min(tokens - share.begin, share.width), share.width};
  }
};

// Where a pipeline stands.
template <int kStages>
struct Position {
  int stage = 0;
  uint32_t parity = 0;
  __device__ __forceinline__ void advance() {
    if (++stage == kStages) stage = 0, parity ^= 1;
  }
};

// --- weights from bytes to bf16 -----------------------------------------------------------------------------------------

__device__ __forceinline__ uint16_t load_pair(uint32_t address) {
  uint16_t pair;
  asm volatile("ld.shared.u16 %0, [%1];" : "=h"(pair) : "r"(address));
  return pair;
}
// Of four matrices of 8 rows x 16 bytes, word lane % 4 of row lane / 4. Lane 8m + r has the address of row r of matrix m.
__device__ __forceinline__ void load_words(uint32_t (&words)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "r"(address));
}
__device__ __forceinline__ uint32_t load_word(uint32_t address) {
  uint32_t word;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(word) : "r"(address));
  return word;
}

// 2^(code - 127) as bf16, for byte i of the codes.
__device__ __forceinline__ uint32_t scale_of(uint32_t codes, int i) {
  const uint32_t code = __byte_perm(codes, 0, 0x4440 + i);
  return code == 255 ? 0x7FC0 : max(code << 7, 0x40);
}

// The scales of a thread's two rows, lane / 4 and 8 further, in a stage: a word each, of four codes or, made ready, two bf16.
template <class C>
struct Scales {
  uint32_t row, row8;

  // `exist` of the codes do. Behind K the weights are zeros, whatever their scales are.
  __device__ __forceinline__ Scales(uint32_t address, int exist)
      : row(load_word(address)), row8(load_word(address + 128)) {
    if (C::kReady || exist >= kTileBlocks) return;
    const uint32_t mask = (1u << 8 * exist) - 1;
    row = (row & mask) | (0x7F7F7F7F & ~mask);
    row8 = (row8 & mask) | (0x7F7F7F7F & ~mask);
  }
  // That of block i, twice.
  static __device__ __forceinline__ uint32_t at(uint32_t word, int i) {
    if constexpr (C::kReady) return __byte_perm(word, 0, 0x1010 + 0x2222 * i);
    return scale_of(word, i) * 0x00010001;
  }
};

// Two e4m3 bytes times a scale. e4m3 is exact in bf16, so the product is rounded once, as dequantize() does it.
__device__ __forceinline__ uint32_t scaled_pair(uint16_t pair, uint32_t scale) {
  uint32_t halves, result;
  asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(halves) : "h"(pair));
  __half2 two;
  memcpy(&two, &halves, 4);
  const float2 values = __half22float2(two);
  asm("{\n\t.reg .b32 both;\n\tcvt.rn.bf16x2.f32 both, %2, %1;\n\tmul.rn.bf16x2 %0, both, %3;\n\t}"
      : "=r"(result)
      : "f"(values.x), "f"(values.y), "r"(scale));
  return result;
}

// Half a stage of 64 weight rows as wgmma takes them: of every 16 of K a thread has two pairs of each of two rows, for c = lane % 4
// those of word c where tokens are interleaved, and otherwise the pairs c and c + 4. 16 of K are a chunk, whose number the row's
// swizzle is added to by XOR; a stage's K is the pitch of its rows. `address` is first_weight() in the stage: where the thread's
// first pair would be if K began at 0, or, of words, the 16 bytes that its lane names to ldmatrix.
template <class C>
__device__ __forceinline__ uint32_t first_weight(int warp, int lane) {
  const int row = warp * 16 + (C::kInterleaved ? lane % 16 : lane / 4), chunk = C::kInterleaved ? lane / 16 : 0;
  const int swizzle = C::kDepth == 128 ? row % 8 : row / 2 % 4;
  return row * C::kDepth + (chunk ^ swizzle) * 16 + (C::kInterleaved ? 0 : lane % 4 * 2);
}
template <class C>
__device__ __forceinline__ void load_weights(uint32_t (&f)[4 * C::kSteps], uint32_t address, int half,
                                             const Scales<C>& scales) {
#pragma unroll
  for (int step = 0; step < C::kSteps; ++step) {
    const int chunk = half * C::kSteps + step;
    const uint32_t at = address ^ chunk * 16;
    const uint32_t scale = Scales<C>::at(scales.row, chunk / 2), scale8 = Scales<C>::at(scales.row8, chunk / 2);
    if constexpr (C::kInterleaved) {
      if (step % 2 == 1) continue;
      uint32_t words[4];
      load_words(words, at);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        uint16_t low, high;
        asm("mov.b32 {%0, %1}, %2;" : "=h"(low), "=h"(high) : "r"(words[i]));
        uint32_t* const to = f + 4 * (step + i / 2) + i % 2;
        to[0] = scaled_pair(low, i % 2 ? scale8 : scale);
        to[2] = scaled_pair(high, i % 2 ? scale8 : scale);
      }
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i)
        f[4 * step + i] = scaled_pair(load_pair(at + i % 2 * 8 * C::kDepth + i / 2 * 8), i % 2 ? scale8 : scale);
    }
  }
}

// --- results ----------------------------------------------------------------------------------------------------------

template <class T>
__device__ __forceinline__ uint32_t round_pair(float a, float b) {
  const typename Pair<T>::type pair = Pair<T>::round(a, b);
  uint32_t word;
  memcpy(&word, &pair, 4);
  return word;
}

// A warp's 16 weight rows x 16 tokens, from fragments to 16-byte pieces of token rows by way of its staging memory.
template <class T>
__device__ __forceinline__ void store_block(const float* d, uint32_t staging, T* out, int64_t out_stride, int tokens) {
  const int lane = threadIdx.x % 32;
  __syncwarp();
  if constexpr (sizeof(T) == 2) {
    const uint32_t row = staging + (lane / 16 * 8 + lane % 8) * 48 + lane / 8 % 2 * 16;
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(row),
                 "r"(round_pair<T>(d[0], d[1])), "r"(round_pair<T>(d[2], d[3])), "r"(round_pair<T>(d[4], d[5])),
                 "r"(round_pair<T>(d[6], d[7]))
                 : "memory");
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const uint32_t at = staging + (i / 4 * 8 + lane % 4 * 2 + i % 2) * 80 + (lane / 4 + i / 2 % 2 * 8) * 4;
      asm volatile("st.shared.f32 [%0], %1;" ::"r"(at), "f"(d[i]) : "memory");
    }
  }
  __syncwarp();
  constexpr int kPieces = sizeof(T) == 2 ? 2 : 4, kPitch = sizeof(T) == 2 ? 48 : 80;
#pragma unroll
  for (int i = 0; i < kPieces / 2; ++i) {
    const int token = (i * 32 + lane) / kPieces, piece = lane % kPieces;
    uint4 v;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "r"(staging + token * kPitch + piece * 16));
    if (token < tokens) reinterpret_cast<uint4*>(out + token * out_stride)[piece] = v;
  }
}

template <class T, int N>
__device__ __forceinline__ void store_tile(const float (&d)[N / 2], uint32_t staging, const GroupedMmParams& p,
                                           const Tile& tile, int64_t row) {
  if (row >= p.n) return;  // 16 rows are inside or outside together
  T* out = static_cast<T*>(p.out) + static_cast<int64_t>(tile.begin) * p.out_stride + row;
#pragma unroll
  for (int block = 0; block < N / 16; ++block)
    if (block * 16 < tile.tokens)
      store_block<T>(d + 8 * block, staging, out + block * 16 * p.out_stride, p.out_stride, tile.tokens - block * 16);
}

// --- the kernel ---------------------------------------------------------------------------------------------------------

template <class C>
struct Block {
  const Arguments& a;
  const CUtensorMap *weights, *tokens;
  const TileTable& table;
  uint32_t base;         // of shared memory
  uint32_t rank;         // in the cluster
  uint32_t other_empty;  // empty(0) of a pair's other block

  __device__ uint32_t weight_at(int stage) const { return base + stage * C::kStageBytes; }
  __device__ uint32_t token_at(int stage) const { return base + stage * C::kStageBytes + C::kWeightBytes; }
  __device__ uint32_t scale_at(int stage) const { return base + Layout<C>::kScales + stage * C::kScaleBytes; }
  __device__ uint32_t full(int stage) const { return base + Layout<C>::kBarriers + stage * 8; }
  __device__ uint32_t empty(int stage) const { return full(C::kStages + stage); }
  __device__ uint32_t ready(int stage) const { return C::kReady ? full(2 * C::kStages + stage) : full(stage); }
  __device__ uint32_t exchanged(int i) const { return full(3 * C::kStages + i); }
  __device__ uint32_t exchange_at(int i) const { return base + Layout<C>::kExchange + i * C::kExchangeBytes; }

  // Clusters go through the tiles in turn.
  __device__ int first_tile() const {
    return C::kCluster == Cluster::kAlone ? blockIdx.x : blockIdx.x / cluster_size();
  }
  __device__ int tile_step() const { return C::kCluster == Cluster::kAlone ? gridDim.x : gridDim.x / cluster_size(); }
  __device__ int cluster_size() const { return C::kCluster == Cluster::kPairs ? 2 : a.splits; }
  __device__ int tile_count() const { return table.first[a.p.groups.count] * a.row_tiles; }

  struct Work {
    Tile tile;
    int row_tile, first, count;  // of kDepth of K
  };
  __device__ __forceinline__ Work work(int index) const {
    Work w;
    w.tile = Tile::find<C::kBox>(table, index, a.row_tiles);
    w.row_tile = C::kCluster == Cluster::kPairs ? 2 * w.tile.row_tile + rank : w.tile.row_tile;
    w.first = C::kCluster == Cluster::kSplit ? a.split_depth * rank : 0;
    w.count = C::kCluster == Cluster::kSplit ? max(0, min(a.split_depth, a.depth - w.first)) : a.depth;
    return w;
  }

  // Begins a stage: all of its bytes are expected from here on.
  __device__ __forceinline__ void copy_weights(const Work& w, int stage, int k) const {
    const uint32_t barrier = full(stage);
    mbarrier_arrive_expect_tx(barrier, C::kWeightBytes + C::kScaleBytes + C::kDepth / 64 * w.tile.width * 128);
    tma_load_3d(weight_at(stage), weights, k, w.row_tile * C::kRows, w.tile.expert, barrier);
#pragma unroll
    for (int i = 0; i < C::kScaleTiles; ++i) {
      // A pair's second block may have no weight rows: then it reads scales that exist.
      const int row = w.row_tile * C::kRows + i * kTileRows;
      const int64_t from = w.tile.expert * a.scale_expert_bytes + (row < a.p.n ? row * a.scale_columns : 0);
      bulk_load(scale_at(stage) + i * kTileBytes, a.p.weight_scales + from + k / 128 * kTileBytes, kTileBytes, barrier);
    }
  }
  __device__ __forceinline__ void copy_tokens(const Work& w, int stage, int k) const {
    const int boxes = w.tile.width / C::kBox;
#pragma unroll 1  // for want of registers
    for (int i = 0; i < C::kDepth / 64; ++i) {
      const uint32_t to = token_at(stage) + i * C::kTokenBytes;
      if constexpr (C::kCluster == Cluster::kPairs) {
        for (int box = rank; box < boxes; box += 2)
          tma_load_2d_multicast(to + box * C::kBox * 128, tokens, k + i * 64, w.tile.begin + box * C::kBox, full(stage),
                                3);
      } else {
        for (int box = 0; box < boxes; ++box)
          tma_load_2d(to + box * C::kBox * 128, tokens, k + i * 64, w.tile.begin + box * C::kBox, full(stage));
      }
    }
  }

  // One warp. The first weights may be on their way before earlier grids have ended, tokens only after that.
  __device__ __forceinline__ void produce() const {
    const bool leader = threadIdx.x % 32 == 0;
    Position<C::kStages> at;
    int early = 0;
    if (a.p.settled && first_tile() < tile_count()) {
      const Work w = work(first_tile());
      early = min(w.count, kEarlyStages);
      for (int i = 0; leader && i < early; ++i) copy_weights(w, i, (w.first + i) * C::kDepth);
    }
    pdl_wait();
    for (int index = first_tile(); index < tile_count(); index += tile_step()) {
      const Work w = work(index);
      for (int i = w.first; i < w.first + w.count; ++i) {
        mbarrier_wait(empty(at.stage), at.parity ^ 1);
        if (leader) {
          if (early == 0) copy_weights(w, at.stage, i * C::kDepth);
          copy_tokens(w, at.stage, i * C::kDepth);
        }
        early -= early > 0;
        at.advance();
      }
    }
    // Until all copies have landed and all arrivals have come, this block's memory must opaque.
    for (int i = 0; i < C::kStages; ++i, at.advance()) mbarrier_wait(empty(at.stage), at.parity ^ 1);
  }

  // A warp for 128 weight rows: two scales in place of a row's four codes, for whichever half of their 128 of K the stage has.
  __device__ __forceinline__ void make_scales(int warp) const {
    Position<C::kStages> at;
    for (int index = first_tile(); index < tile_count(); index += tile_step())
      for (int i = 0; i < a.depth; ++i, at.advance()) {
        mbarrier_wait(full(at.stage), at.parity);
        const uint32_t line = scale_at(at.stage) + warp * kTileBytes + threadIdx.x % 32 * 16;
        uint32_t words[4];
        asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                     : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                     : "r"(line));
#pragma unroll
        for (uint32_t& word : words) {
          const uint32_t first = scale_of(word, i % 2 * 2), second = scale_of(word, i % 2 * 2 + 1);
          word = first | (2 * i + 1 == a.blocks ? 0x3F80 : second) << 16;  // 1 behind K, as in Scales
        }
        asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(line), "r"(words[0]), "r"(words[1]),
                     "r"(words[2]), "r"(words[3])
                     : "memory");
        fence_proxy_async();
        mbarrier_arrive(ready(at.stage));
      }
  }

  __device__ __forceinline__ void release(int stage) const {
    if (threadIdx.x % 32 != 0) return;
    if constexpr (C::kCluster == Cluster::kPairs) {
      mbarrier_arrive_remote(other_empty + 8 * stage);
    }
    mbarrier_arrive(empty(stage));
  }

  // Adds the product of half a stage.
  template <int N>
  __device__ __forceinline__ void multiply_half(float (&d)[N / 2], const uint32_t (&f)[4 * C::kSteps], int stage,
                                                int half, bool first) const {
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < C::kSteps; ++step) {
      const int k = (half * C::kSteps + step) * 16;
      const uint64_t tile = swizzled_tile(token_at(stage), k / 64 * C::kTokenBytes + k % 64 * 2);
      Wgmma<N>::run(d, f + 4 * step, tile, !(first && step == 0));
    }
    wgmma_commit();
  }

  // The sums of this thread's weight rows and N tokens over the block's part of K. Weights are made ready while the product of
  // those before still runs. The loop is entered with two products on their way, as it is repeated: what is in flight must have
  // been written on every path, or the compiler keeps the registers of all widths at once, and serialises for want of them.
  template <int N>
  __device__ __forceinline__ void sum(float (&d)[N / 2], const Work& w, Position<C::kStages>& at) const {
    const int thread = threadIdx.x, lane = thread % 32, row = thread / 32 * 16 + lane / 4;
    const uint32_t offset = first_weight<C>(thread / 32, lane);
    const uint32_t scale_offset = row % 32 * 16 + row % 128 / 32 * 4 + row / 128 * kTileBytes;

    const auto scales_of = [&](int stage, int index) {
      return Scales<C>(scale_at(stage) + scale_offset, a.blocks - index * kTileBlocks);
    };
    const auto load = [&](uint32_t (&f)[4 * C::kSteps], const Scales<C>& scales, int stage, int half) {
      load_weights<C>(f, weight_at(stage) + offset, half, scales);
    };

    if (w.count == 0) {
#pragma unroll
      for (float& value : d) value = 0;
      return;
    }
    uint32_t even[4 * C::kSteps], odd[4 * C::kSteps];
    mbarrier_wait(ready(at.stage), at.parity);
    Scales<C> scales = scales_of(at.stage, w.first);
    load(even, scales, at.stage, 0);
    multiply_half<N>(d, even, at.stage, 0, true);
    load(odd, scales, at.stage, 1);
    multiply_half<N>(d, odd, at.stage, 1, false);
    for (int i = 1; i < w.count; ++i) {
      const int stage = at.stage;
      at.advance();
      mbarrier_wait(ready(at.stage), at.parity);
      scales = scales_of(at.stage, w.first + i);
      wgmma_wait<1>();
      load(even, scales, at.stage, 0);
      multiply_half<N>(d, even, at.stage, 0, false);
      wgmma_wait<1>();
      release(stage);
      load(odd, scales, at.stage, 1);
      multiply_half<N>(d, odd, at.stage, 1, false);
    }
    wgmma_wait<0>();
    release(at.stage);
    at.advance();
  }

  // Each block of the cluster adds up a part of the sums: those of all blocks, in their order.
  template <int N>
  __device__ __forceinline__ void add_parts(float (&d)[N / 2], int turn) const {
    const int thread = threadIdx.x, share = N / 2 / a.splits;
    const uint32_t buffer = exchange_at(turn % 2);
    if (thread == 0) mbarrier_arrive_expect_tx(exchanged(turn % 2), a.splits * share * C::kConsumerThreads * 4);
#pragma unroll
    for (int i = 0; i < N / 2; ++i) {
      const uint32_t at = buffer + ((rank * share + i % share) * C::kConsumerThreads + thread) * 4;
      st_async(mapa(at, i / share), d[i], mapa(exchanged(turn % 2), i / share));
    }
    mbarrier_wait(exchanged(turn % 2), turn / 2 % 2);
#pragma unroll
    for (int i = 0; i < N / 2; ++i) {
      if (i / share != static_cast<int>(rank)) continue;
      float total = 0;
      for (int block = 0; block < a.splits; ++block) {
        float part;
        asm volatile("ld.shared.f32 %0, [%1];"
                     : "=f"(part)
                     : "r"(buffer + ((block * share + i % share) * C::kConsumerThreads + thread) * 4));
        total = block == 0 ? part : total + part;
      }
      d[i] = total;
    }
  }

  template <int N>
  __device__ __forceinline__ void store_part(const float (&d)[N / 2], const Tile& tile, int64_t row0) const {
    const int share = N / 2 / a.splits, lane = threadIdx.x % 32;
    if (row0 >= a.p.n) return;
#pragma unroll
    for (int i = 0; i < N / 2; ++i) {
      if (i / share != static_cast<int>(rank)) continue;
      const int token = i / 4 * 8 + lane % 4 * 2 + i % 2;
      if (token >= tile.tokens) continue;
      const int64_t at = (tile.begin + token) * a.p.out_stride + row0 + lane / 4 + i / 2 % 2 * 8;
      if (a.p.out_dtype == DType::kBfloat16) static_cast<__nv_bfloat16*>(a.p.out)[at] = __float2bfloat16_rn(d[i]);
      if (a.p.out_dtype == DType::kFloat16) static_cast<__half*>(a.p.out)[at] = __float2half_rn(d[i]);
      if (a.p.out_dtype == DType::kFloat32) static_cast<float*>(a.p.out)[at] = d[i];
    }
  }

  template <int N>
  __device__ __forceinline__ void consume_tile(const Work& w, Position<C::kStages>& at, int turn) const {
    float d[N / 2];
    sum<N>(d, w, at);
    const int warp = threadIdx.x / 32;
    const int64_t row = int64_t{w.row_tile} * C::kRows + warp * 16;
    if constexpr (C::kCluster == Cluster::kSplit) {
      if (a.splits > 1) add_parts<N>(d, turn);
      store_part<N>(d, w.tile, row);
    } else {
      const uint32_t staging = base + Layout<C>::kStaging + warp * C::kStagingBytes;
      switch (a.p.out_dtype) {
        case DType::kBfloat16: return store_tile<__nv_bfloat16, N>(d, staging, a.p, w.tile, row);
        case DType::kFloat16: return store_tile<__half, N>(d, staging, a.p, w.tile, row);
        case DType::kFloat32: return store_tile<float, N>(d, staging, a.p, w.tile, row);
      }
    }
  }

  // The variant for a tile's width.
  template <int N>
  __device__ __forceinline__ void consume_width(const Work& w, Position<C::kStages>& at, int turn) const {
    constexpr int kNarrower = N - C::kBox;
    if constexpr (kNarrower > 0)
      if (w.tile.width <= kNarrower) return consume_width<kNarrower>(w, at, turn);
    consume_tile<N>(w, at, turn);
  }

  __device__ __forceinline__ void consume() const {
    Position<C::kStages> at;
    int turn = 0;
    for (int index = first_tile(); index < tile_count(); index += tile_step(), ++turn) {
      Work w = work(index);
      w.tile.width = __shfl_sync(~0u, w.tile.width, 0);  // of a lane, so that the compiler knows it is of all
      consume_width<C::kTokens>(w, at, turn);
    }
  }
};

template <class C>
__global__ void __launch_bounds__(C::kThreads, C::kResident)
    grouped_mm_kernel(const __grid_constant__ Arguments a, const __grid_constant__ CUtensorMap weights,
                      const __grid_constant__ CUtensorMap tokens) {
  extern __shared__ uint8_t dynamic[];
  uint8_t* memory = dynamic + (1024 - smem_address(dynamic) % 1024) % 1024;
  TileTable table(memory + Layout<C>::kTable, a.p.groups.count);
  const uint32_t base = smem_address(memory), rank = C::kCluster == Cluster::kAlone ? 0 : cta_rank_in_cluster();
  const uint32_t other_empty =
      C::kCluster == Cluster::kPairs ? mapa(base + Layout<C>::kBarriers + C::kStages * 8, rank ^ 1) : 0;
  const Block<C> block{a, &weights, &tokens, table, base, rank, other_empty};
  if (threadIdx.x == 0) {
    prefetch_tma_desc(&weights);
    prefetch_tma_desc(&tokens);
    for (int i = 0; i < C::kStages; ++i) {
      mbarrier_init(block.full(i), 1);
      mbarrier_init(block.empty(i), C::kConsumerThreads / 32 * (C::kCluster == Cluster::kPairs ? 2 : 1));
      if (C::kReady) mbarrier_init(block.ready(i), 32 * C::kScaleTiles);
    }
    for (int i = 0; i < C::kExchanges; ++i) mbarrier_init(block.exchanged(i), 1);
    fence_mbarrier_init();
  }
  if (!a.p.settled) pdl_wait();
  table.build<C::kThreads>(a.p.groups, C::kTokens);
  if constexpr (C::kCluster != Cluster::kAlone) cluster_sync();
  if (threadIdx.x >= C::kConsumerThreads) {
    warpgroup_reg_dealloc<C::kProducerRegisters>();
    const int warp = (threadIdx.x - C::kConsumerThreads) / 32;
    if (warp == 0) block.produce();
    if (C::kReady && warp > 0 && warp <= C::kScaleTiles) block.make_scales(warp - 1);
    if constexpr (C::kCluster != Cluster::kAlone) cluster_sync();
  } else {
    warpgroup_reg_alloc<C::kConsumerRegisters>();
    pdl_wait();
    pdl_launch_dependents();  // not sooner: the kernel behind the next one may count on what this one waited for
    block.consume();
    if constexpr (C::kCluster != Cluster::kAlone) cluster_sync();
  }
}

template <bool kInterleaved>
using Split = Config<kInterleaved, TileKind::kSplit, 2, 128, 8, Cluster::kSplit>;
template <bool kInterleaved>
using Few = Config<kInterleaved, TileKind::kFew, 2, 128, 6, Cluster::kAlone>;
template <bool kInterleaved>
using FewTwice = Config<kInterleaved, TileKind::kFewTwice, 2, 128, 3, Cluster::kAlone, 2>;
template <bool kInterleaved>
using Some = Config<kInterleaved, TileKind::kSome, 4, 64, 6, Cluster::kAlone>;
template <bool kInterleaved>
using More = Config<kInterleaved, TileKind::kMore, 2, 64, 7, Cluster::kPairs>;
template <bool kInterleaved>
using Many = Config<kInterleaved, TileKind::kMany, 2, 64, 5, Cluster::kPairs>;

template <class C>
constexpr uint32_t most_bytes() {
  return Layout<C>::bytes(C::kKind == TileKind::kSome ? kSomeExperts : kMaxExperts);
}
constexpr uint32_t kSharedBytes = (227 << 10) - 256;  // that a block may have, beside what kernels declare themselves

template <class C>
cudaError_t start(const GroupedMmParams& p, int splits, cudaStream_t stream) {
  static_assert(most_bytes<C>() <= kSharedBytes);
  static_assert(C::kKind > TileKind::kFewTwice || C::kRows == kWeightRows);
  CUtensorMap weights, tokens;
  const cuuint64_t weight_sizes[] = {static_cast<cuuint64_t>(p.k), static_cast<cuuint64_t>(p.n),
                                     static_cast<cuuint64_t>(p.groups.count)};
  const cuuint64_t weight_strides[] = {static_cast<cuuint64_t>(p.weight_stride),
                                       static_cast<cuuint64_t>(p.weight_expert_stride)};
  const cuuint32_t weight_box[] = {C::kDepth, C::kRows, 1};
  cudaError_t status =
      make_tma_desc(&weights, CU_TENSOR_MAP_DATA_TYPE_UINT8, 3, p.weight, weight_sizes, weight_strides, weight_box,
                    C::kDepth == 128 ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_64B);
  if (status != cudaSuccess) return status;
  const cuuint64_t token_sizes[] = {static_cast<cuuint64_t>(p.k), static_cast<cuuint64_t>(p.groups.rows)};
  const cuuint64_t token_strides[] = {static_cast<cuuint64_t>(p.a_stride) * 2};
  const cuuint32_t token_box[] = {64, C::kBox};
  status = make_tma_desc(&tokens, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2, p.a, token_sizes, token_strides, token_box,
                         CU_TENSOR_MAP_SWIZZLE_128B);
  if (status != cudaSuccess) return status;

  Arguments a{};
  a.p = p;
  a.scale_columns = scale_columns(p.k);
  a.scale_expert_bytes = round_up(p.n, kTileRows) * a.scale_columns;
  const int64_t tiles = (p.n + C::kRows - 1) / C::kRows;
  a.row_tiles = static_cast<int>(C::kCluster == Cluster::kPairs ? (tiles + 1) / 2 : tiles);
  a.depth = static_cast<int>((p.k + C::kDepth - 1) / C::kDepth);
  a.blocks = static_cast<int>(p.k / kBlock);
  a.splits = splits;
  a.split_depth = (a.depth + splits - 1) / splits;

  const unsigned cluster = C::kCluster == Cluster::kPairs ? 2 : C::kCluster == Cluster::kSplit ? splits : 1;
  const uint32_t bytes = Layout<C>::bytes(p.groups.count);
  int multiprocessors = 0;
  status = device_attribute(cudaDevAttrMultiProcessorCount, &multiprocessors);
  if (status == cudaSuccess)
    // The same for all calls: it is the kernel's, and another thread's call may stand between this and the launch.
    status = cudaFuncSetAttribute(grouped_mm_kernel<C>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                  static_cast<int>(most_bytes<C>()));
  if (status != cudaSuccess) return status;

  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {cluster, 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = static_cast<unsigned>(multiprocessors * C::kResident) / cluster * cluster;
  config.blockDim = C::kThreads;
  config.dynamicSmemBytes = bytes;
  config.attrs = &attribute;
  config.numAttrs = 1;
  int clusters = multiprocessors * C::kResident;
  if (cluster > 1) status = cudaOccupancyMaxActiveClusters(&clusters, grouped_mm_kernel<C>, &config);
  if (status != cudaSuccess) return status;
  return abiding::launch(grouped_mm_kernel<C>,
                         LaunchConfig{static_cast<unsigned>(clusters) * cluster, C::kThreads, bytes, cluster}, stream,
                         a, weights, tokens);
}

template <bool kInterleaved>
cudaError_t start_planned(const GroupedMmParams& p, cudaStream_t stream) {
  const Plan plan = choose_plan(p.groups.rows, p.groups.count, p.n, p.k);
  switch (plan.kind) {
    case TileKind::kSplit: return start<Split<kInterleaved>>(p, plan.splits, stream);
    case TileKind::kFew: return start<Few<kInterleaved>>(p, 1, stream);
    case TileKind::kFewTwice: return start<FewTwice<kInterleaved>>(p, 1, stream);
    case TileKind::kSome: return start<Some<kInterleaved>>(p, 1, stream);
    case TileKind::kMore: return start<More<kInterleaved>>(p, 1, stream);
    case TileKind::kMany: break;
  }
  return start<Many<kInterleaved>>(p, 1, stream);
}

}  // namespace

cudaError_t grouped_mm_sm90(const GroupedMmParams& p, cudaStream_t stream) {
  return p.interleaved ? start_planned<true>(p, stream) : start_planned<false>(p, stream);
}

}  // namespace abiding::mxfp8_moe
