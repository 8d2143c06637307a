// The sm_90 grouped GEMM: its kernel, and the launch of a configuration. The parts by role are in the other files here.
#pragma once

#include "common/launch.cuh"
#include "mxfp8_moe/grouped_mm_sm90/epilogue.cuh"
#include "mxfp8_moe/grouped_mm_sm90/mainloop.cuh"
#include "mxfp8_moe/grouped_mm_sm90/mainloop_fp8.cuh"
#include "mxfp8_moe/grouped_mm_sm90/producer.cuh"
#include "mxfp8_moe/kernels.h"

namespace abiding::mxfp8_moe::sm90_mm {
namespace {

// Compiles mainloop and epilogue for every width up to N and runs the one that the tile has.
template <class C, int N>
__device__ __forceinline__ void consume_tile(const Cta<C>& cta, const WorkTile& w, PipelineState<C::kStages>& at) {
  constexpr int kNarrower = N - C::kTileStep;
  if constexpr (kNarrower > 0)
    if (w.n <= kNarrower) return consume_tile<C, kNarrower>(cta, w, at);
  float d[C::kRowBlocks][N / 2];
  if constexpr (C::kFp8)
    mainloop_fp8<C, N>(cta, d, w, at);
  else
    mainloop<C, N>(cta, d[0], w, at);
#pragma unroll
  for (int block = 0; block < C::kRowBlocks; ++block) epilogue<C, N>(cta, d[block], w, block);
}

template <class C>
__device__ __forceinline__ void consume(const Cta<C>& cta) {
  PipelineState<C::kStages> at;
  for (Scheduler<C> tiles(cta); !tiles.done();) {
    WorkTile w = tiles.tile();
    w.n = __shfl_sync(~0u, w.n, 0);  // broadcast from lane 0, so that the value is provably warp-uniform
    consume_tile<C, C::kBlockN>(cta, w, at);
    tiles.advance(w);
  }
  // The CTA's shared memory must outlive what TMA stores from it.
  if (C::kHalves && threadIdx.x % 128 == 0) bulk_wait_read<0>();
}

template <class C>
__global__ void __launch_bounds__(C::kLaunchBound, C::kCtasPerSm)
    grouped_mm_kernel(const __grid_constant__ KernelParams a, const __grid_constant__ CUtensorMap weights,
                      const __grid_constant__ TokenMaps<C> tokens, const __grid_constant__ CUtensorMap out) {
  extern __shared__ uint8_t dynamic_smem[];
  uint8_t* memory = dynamic_smem + (1024 - smem_address(dynamic_smem) % 1024) % 1024;
  TileTable table(memory + SmemLayout<C>::kTable, a.p.groups.count);
  const uint32_t smem = smem_address(memory), rank = C::kCluster == ClusterMode::kNone ? 0 : cta_rank_in_cluster();
  const uint32_t peer_empty_barrier =
      C::kCluster == ClusterMode::kMulticast ? mapa(smem + SmemLayout<C>::kBarriers + C::kStages * 8, rank ^ 1) : 0;
  const Cta<C> cta{a, &weights, &tokens, &out, table, smem, rank, peer_empty_barrier};
  if (threadIdx.x == 0) {
    prefetch_tma_desc(&weights);
    for (const CUtensorMap& map : tokens.of_width) prefetch_tma_desc(&map);
    for (int i = 0; i < C::kStages; ++i) {
      mbarrier_init(cta.full_barrier(i), 1);
      mbarrier_init(cta.empty_barrier(i), C::kConsumerThreads / 32 * (C::kCluster == ClusterMode::kMulticast ? 2 : 1));
      if (C::kConvertedScales) mbarrier_init(cta.ready_barrier(i), (C::kFp8 ? 1 : 32) * C::kScaleTiles);
    }
    if (C::kPartBytes > 0) mbarrier_init(cta.part_barrier(), 1);
    fence_mbarrier_init();
  }
  // PDL contract (layer.cu): group offsets are read before the wait only where inputs_ready_before_pdl.
  if (!a.p.inputs_ready_before_pdl) pdl_wait();
  table.build<C::kThreads>(a.p.groups, C::kBlockN);
  if constexpr (C::kCluster != ClusterMode::kNone) cluster_sync();
  if (threadIdx.x >= C::kConsumerThreads) {
    warpgroup_reg_dealloc<C::kProducerRegisters>();
    const int warp = (threadIdx.x - C::kConsumerThreads) / 32;
    if (warp == 0) produce(cta);
    if (C::kConvertedScales && warp > 0 && warp <= C::kScaleTiles) {
      if constexpr (C::kFp8)
        convert_row_scales(cta, warp - 1);
      else
        convert_scales(cta, warp - 1);
    }
    if constexpr (C::kCluster != ClusterMode::kNone) cluster_sync();
  } else {
    warpgroup_reg_alloc<C::kConsumerRegisters>();
    pdl_wait();
    // PDL contract (layer.cu): not before pdl_wait; the kernel two downstream may rely on what this one waited for.
    pdl_launch_dependents();
    consume(cta);
    if constexpr (C::kCluster != ClusterMode::kNone) cluster_sync();
  }
}

template <class C>
constexpr uint32_t max_smem_bytes() {
  return SmemLayout<C>::bytes(max_experts(C::kRows, C::kShape));
}
constexpr uint32_t kStaticSmemBytes = 256;                        // more than kernels declare
constexpr uint32_t kSmemPerCta = (227 << 10) - kStaticSmemBytes;  // the device's limit
// Of an SM of 228 KiB, of which it reserves 1 KiB per CTA.
constexpr uint32_t kSmemOfTwoCtas = (114 << 10) - 1024 - kStaticSmemBytes;

// Tensor maps of the weights [experts, n, k], of the tokens [rows, k] and, where TMA stores it, of the output
// [rows, n].
template <class C>
cudaError_t make_tma_descs(const GroupedMmParams& p, CUtensorMap* weights, TokenMaps<C>* tokens, CUtensorMap* out) {
  const cuuint64_t weight_sizes[] = {static_cast<cuuint64_t>(p.k), static_cast<cuuint64_t>(p.n),
                                     static_cast<cuuint64_t>(p.groups.count)};
  const cuuint64_t weight_strides[] = {static_cast<cuuint64_t>(p.weight_stride),
                                       static_cast<cuuint64_t>(p.weight_expert_stride)};
  const cuuint32_t weight_box[] = {C::kBlockK, C::kBlockM, 1};
  cudaError_t status =
      make_tma_desc(weights, CU_TENSOR_MAP_DATA_TYPE_UINT8, 3, p.weight, weight_sizes, weight_strides, weight_box,
                    C::kBlockK == 128 ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_64B);
  if (status != cudaSuccess) return status;
  const cuuint64_t token_sizes[] = {static_cast<cuuint64_t>(p.k), static_cast<cuuint64_t>(p.groups.rows)};
  const cuuint64_t token_strides[] = {static_cast<cuuint64_t>(p.a_stride) * (C::kFp8 ? 1 : 2)};
  for (int i = 0; i < C::kWidths && status == cudaSuccess; ++i) {
    const cuuint32_t rows = (i + 1) * C::kTileStep / (C::kCluster == ClusterMode::kMulticast ? 2 : 1);
    const cuuint32_t token_box[] = {C::kSlabK, rows};
    status =
        make_tma_desc(tokens->of_width + i, C::kFp8 ? CU_TENSOR_MAP_DATA_TYPE_UINT8 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
                      2, p.a, token_sizes, token_strides, token_box, CU_TENSOR_MAP_SWIZZLE_128B);
  }
  if (status != cudaSuccess || !C::kHalves || p.out_dtype == DType::kFloat32) return status;
  const cuuint64_t out_sizes[] = {static_cast<cuuint64_t>(p.n), static_cast<cuuint64_t>(p.groups.rows)};
  const cuuint64_t out_strides[] = {static_cast<cuuint64_t>(p.out_stride) * 2};
  const cuuint32_t out_box[] = {64, Staging<C, uint16_t>::kBatch};
  return make_tma_desc(out, CU_TENSOR_MAP_DATA_TYPE_UINT16, 2, p.out, out_sizes, out_strides, out_box,
                       CU_TENSOR_MAP_SWIZZLE_128B);
}

template <class C>
cudaError_t launch_config(const GroupedMmParams& p, int cluster_size, int sms, cudaStream_t stream) {
  static_assert(max_smem_bytes<C>() <= (C::kShape == TileShape::kN32 ? kSmemOfTwoCtas : kSmemPerCta));
  static_assert(C::kCluster != ClusterMode::kStreamK || (C::kBlockM == kStreamKBlockM && C::kBlockK == kStreamKBlockK));
  CUtensorMap weights, out{};
  TokenMaps<C> tokens;
  cudaError_t status = make_tma_descs<C>(p, &weights, &tokens, &out);
  if (status != cudaSuccess) return status;

  KernelParams a{};
  a.p = p;
  a.scale_columns = scale_columns(p.k);
  a.expert_scale_bytes = round_up(p.n, kScaleTileRows) * a.scale_columns;
  const int64_t m_tiles = (p.n + C::kBlockM - 1) / C::kBlockM;
  a.m_tiles = static_cast<int>(C::kCluster == ClusterMode::kMulticast ? (m_tiles + 1) / 2 : m_tiles);
  a.k_tiles = static_cast<int>((p.k + C::kBlockK - 1) / C::kBlockK);
  a.scale_blocks = static_cast<int>(p.k / kScaleBlock);
  a.cluster_size = cluster_size;

  const uint32_t smem_bytes = SmemLayout<C>::bytes(p.groups.count);
  // The same value in every call: the limit is the kernel's, and another thread may set it between this and the launch.
  status = cudaFuncSetAttribute(grouped_mm_kernel<C>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                static_cast<int>(max_smem_bytes<C>()));
  if (status != cudaSuccess) return status;

  const auto cluster = static_cast<unsigned>(cluster_size);
  int clusters = sms * C::kCtasPerSm / cluster_size;
  if (cluster > 1) {
    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim = {cluster, 1, 1};
    cudaLaunchConfig_t config{};
    config.gridDim = static_cast<unsigned>(clusters) * cluster;
    config.blockDim = C::kThreads;
    config.dynamicSmemBytes = smem_bytes;
    config.attrs = &attribute;
    config.numAttrs = 1;
    status = cudaOccupancyMaxActiveClusters(&clusters, grouped_mm_kernel<C>, &config);
    if (status != cudaSuccess) return status;
  }
  return launch(grouped_mm_kernel<C>,
                with_max_smem({static_cast<unsigned>(clusters) * cluster, C::kThreads, smem_bytes, cluster}), stream, a,
                weights, tokens, out);
}

// What TMA asks of tensors: strides of whole 16-byte vectors, below 2^40 bytes.
bool fits_tma(int64_t stride_bytes) { return stride_bytes % 16 == 0 && stride_bytes < int64_t{1} << 40; }
bool weights_fit_tma(const GroupedMmParams& p) { return fits_tma(p.weight_stride) && fits_tma(p.weight_expert_stride); }

GroupedMmImpl make_impl(const char* name, RowFormat row_format, bool (*supports)(const GroupedMmParams&),
                        cudaError_t (*run)(const GroupedMmParams&, cudaStream_t)) {
  GroupedMmImpl impl{};
  impl.name = name;
  impl.arch = 90;
  impl.row_format = row_format;
  impl.supports = supports;
  impl.run = run;
  return impl;
}

}  // namespace
}  // namespace abiding::mxfp8_moe::sm90_mm
