// The sm_90 grouped GEMM: its configurations, the layout of shared memory and the state that all roles of a CTA share.
//
// Swap-AB: wgmma's A operand is weights, and its B operand is tokens, from shared memory. Beside bf16 tokens weights
// become bf16 in registers (mainloop.cuh); beside e4m3 tokens they stay in shared memory (mainloop_fp8.cuh). A CTA tile
// is kBlockM weight rows x N tokens, N as wide as the tokens of an expert ask for. A CTA is persistent (scheduler.cuh)
// and has one producer warpgroup (producer.cuh: a TMA warp and, where tiles are large or tokens e4m3, scale converter
// warps) and two or four consumer warpgroups, which own one or two blocks of 64 weight rows each (mainloop.cuh,
// epilogue.cuh).
#pragma once

#include "common/sm90.cuh"
#include "mxfp8_moe/grouped_mm_sm90/plan.h"
#include "mxfp8_moe/params.h"
#include "mxfp8_moe/tile_table.cuh"

namespace abiding::mxfp8_moe::sm90_mm {

using namespace sm90;

// What the CTAs of a cluster have in common.
enum class ClusterMode {
  kNone,
  kMulticast,  // two CTAs take neighboring weight rows; each loads half of the tokens, to both (TMA multicast)
  kStreamK     // the CTAs divide the K tiles of the cluster's tiles evenly, and hand accumulators over (scheduler.cuh)
};

// Weight stages that a CTA loads before pdl_wait. More would compete with what the upstream kernel still reads.
constexpr int kStagesBeforePdlWait = 2;

// A pipeline stage is one K tile, kBlockK of K, which the mainloop of bf16 tokens multiplies in two halves.
template <RowFormat kRows_, TileShape kShape_, int kConsumerWarpgroups_, int kBlockK_, int kStages_,
          ClusterMode kCluster_, int kCtasPerSm_ = 1, int kRowBlocks_ = 1, int kTokenBlocks_ = 1>
struct Config {
  static constexpr RowFormat kRows = kRows_;  // the tokens
  static constexpr bool kFp8 = kRows == RowFormat::kE4m3, kInterleaved = kRows == RowFormat::kBf16Interleaved;
  static constexpr TileShape kShape = kShape_;
  static constexpr int kConsumerWarpgroups = kConsumerWarpgroups_, kBlockK = kBlockK_, kStages = kStages_;
  static constexpr ClusterMode kCluster = kCluster_;
  static constexpr int kCtasPerSm = kCtasPerSm_;
  // A consumer warpgroup's part of a tile is kRowBlocks blocks of 64 weight rows, which it multiplies one after the
  // other, by kTokenBlocks equal parts of the tokens, whose products are in flight together.
  static constexpr int kRowBlocks = kRowBlocks_, kTokenBlocks = kTokenBlocks_;
  static_assert(kTokenBlocks <= 2 && (kRowBlocks * kTokenBlocks == 1 || kFp8));
  static constexpr int kConsumerThreads = 128 * kConsumerWarpgroups, kThreads = kConsumerThreads + 128;

  // The CTAs of kStreamK_N16 leave registers for CTAs of the layer's other kernels beside them (layer.cu): the kernel
  // is compiled for more threads per CTA than it has. kN32 and kN64 have none to spare: ptxas would serialize wgmma of
  // kN64 (C7512).
  static constexpr int kSpareThreads = kShape == TileShape::kStreamK_N16 ? 128 : 0;
  static constexpr int kLaunchBound = kThreads + kSpareThreads;
  // Registers per thread: at first (a multiple of 8), and after setmaxnreg has moved some from producer to consumers.
  static constexpr int kRegisters = 65536 / (kLaunchBound * kCtasPerSm) / 8 * 8;
  static constexpr int kProducerRegisters = kRegisters >= 128 ? 40 : 32;
  static constexpr int kConsumerRegisters =
      (kThreads * kRegisters - 128 * kProducerRegisters) / kConsumerThreads / 8 * 8;

  static constexpr int kWarpgroupRows = 64 * kRowBlocks, kBlockM = kWarpgroupRows * kConsumerWarpgroups;  // weight rows
  static_assert(kBlockM % kScaleTileRows == 0);
  static constexpr int kBlockN = max_tokens(kShape), kTileStep = tile_step(kShape);
  static constexpr int kScaleTiles = kBlockM / kScaleTileRows;  // per stage
  static constexpr int kMmasPerHalf = kBlockK / 32;             // wgmma takes 16 of K of bf16

  // A stage of 64 of K needs two scales per row. As bf16 they take the 4 bytes of the row's four codes, so the producer
  // warpgroup's spare warps convert them in place, one warp per 128 weight rows. Beside e4m3 tokens a weight row has
  // one scale: a spare warp checks that all of its codes are the same, and makes a float of them. Consumers need that
  // at the end of a tile.
  static constexpr bool kConvertedScales = kFp8 || kBlockK / kScaleBlock == 2;
  static_assert(!kConvertedScales || (kScaleTiles <= 3 && (kFp8 || kCluster != ClusterMode::kStreamK)));

  static constexpr uint32_t kWeightBytes = kBlockM * kBlockK;  // per stage
  // A slab has kSlabK of K of every token of the tile: a row of the 128-byte swizzle.
  static constexpr int kSlabK = kFp8 ? 128 : 64, kSlabs = kBlockK / kSlabK;
  static_assert(kSlabs == 1 || kCluster != ClusterMode::kMulticast);
  // Slabs, and the halves that multicast brings, begin at an atom of the swizzle: 8 tokens.
  static_assert(kTileStep % (kCluster == ClusterMode::kMulticast ? 16 : 8) == 0);
  static constexpr uint32_t kStageBytes = kWeightBytes + kSlabs * kBlockN * 128;
  // Per stage. Beside e4m3 tokens their scales lie behind those of the weights, a float each.
  static constexpr uint32_t kWeightScaleBytes = kScaleTiles * kScaleTileBytes;
  static constexpr uint32_t kScaleBytes = kWeightScaleBytes + (kFp8 ? kBlockN * 4 : 0);
  static constexpr uint32_t kPartBytes = kCluster == ClusterMode::kStreamK ? kBlockM * kBlockN * 4 : 0;  // accumulators
  static constexpr int kWidths = kBlockN / kTileStep;  // that a tile may have: kTileStep, 2 kTileStep .. kBlockN
  // Of tiles of many e4m3 tokens, TMA stores the results of half a tile while the next one is multiplied.
  static constexpr bool kHalves = kFp8 && kBlockN >= 128;
  // The epilogue's, per warpgroup: two buffers of vectors, kStagingVectors per thread.
  static constexpr int kStagingVectors = kHalves ? kBlockN / 2 / 16 : 1;
  static constexpr uint32_t kStagingBytes = 128 * 16 * kStagingVectors, kEpilogueBytes = 2 * kStagingBytes;
};

// Offsets in dynamic shared memory, from a 1024-byte boundary (an atom of the 128-byte swizzle).
template <class C>
struct SmemLayout {
  static constexpr uint32_t kScales = C::kStages * C::kStageBytes;
  static constexpr uint32_t kPart = kScales + C::kStages * C::kScaleBytes;
  static constexpr uint32_t kEpilogue = C::kHalves ? round_up(kPart + C::kPartBytes, 1024) : kPart + C::kPartBytes;
  static constexpr uint32_t kBarriers = kEpilogue + C::kConsumerWarpgroups * C::kEpilogueBytes;
  static constexpr uint32_t kTable = kBarriers + (3 * C::kStages + 1) * 8;
  static constexpr uint32_t bytes(int64_t experts) { return 1024 + kTable + TileTable::bytes(experts); }
};

// TMA descriptors of the tokens, one per width that a tile may have: so one load brings a slab of any tile. Each load
// more takes its time. Boxes are as wide as the tile; kMulticast: as half of it.
template <class C>
struct TokenMaps {
  CUtensorMap of_width[C::kWidths];
};

struct KernelParams {
  GroupedMmParams p;
  int64_t scale_columns, expert_scale_bytes;
  int m_tiles;       // m tiles of an expert; kMulticast: pairs of them
  int cluster_size;  // in CTAs
  int k_tiles;       // of kBlockK, the last perhaps partial
  int scale_blocks;  // of 32 in K
};

// A position in the ring of stages, and the phase of its mbarriers.
template <int kStages>
struct PipelineState {
  int stage = 0;
  uint32_t phase = 0;
  __device__ __forceinline__ void advance() {
    if (++stage == kStages) stage = 0, phase ^= 1;
  }
};

// A CTA as its roles see it: parameters, and addresses in shared memory.
template <class C>
struct Cta {
  const KernelParams& a;
  const CUtensorMap* weights;
  const TokenMaps<C>* tokens;
  const CUtensorMap* out;
  const TileTable& table;
  uint32_t smem;                // its base
  uint32_t cluster_rank;        // of this CTA in its cluster
  uint32_t peer_empty_barrier;  // kMulticast: empty_barrier(0) of the other CTA

  __device__ uint32_t weight_smem(int stage) const { return smem + stage * C::kStageBytes; }
  __device__ uint32_t token_smem(int stage) const { return smem + stage * C::kStageBytes + C::kWeightBytes; }
  __device__ uint32_t scale_smem(int stage) const { return smem + SmemLayout<C>::kScales + stage * C::kScaleBytes; }
  __device__ uint32_t token_scale_smem(int stage) const { return scale_smem(stage) + C::kWeightScaleBytes; }
  __device__ uint32_t part_smem() const { return smem + SmemLayout<C>::kPart; }
  __device__ uint32_t full_barrier(int stage) const { return smem + SmemLayout<C>::kBarriers + stage * 8; }
  __device__ uint32_t empty_barrier(int stage) const { return full_barrier(C::kStages + stage); }
  // The scales are converted or, beside e4m3 tokens, checked; for the last stage of a work tile they are in place.
  __device__ uint32_t ready_barrier(int stage) const {
    return C::kConvertedScales ? full_barrier(2 * C::kStages + stage) : full_barrier(stage);
  }
  __device__ uint32_t part_barrier() const { return full_barrier(3 * C::kStages); }
};

}  // namespace abiding::mxfp8_moe::sm90_mm
