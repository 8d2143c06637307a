// The quantiser and its inverse. Four lanes have a block of 32 elements, eight each: what fits a 16-byte access.
#include "common/launch.cuh"
#include "mxfp8_moe/dequantize.cuh"
#include "mxfp8_moe/kernels.h"
#include "mxfp8_moe/octet.cuh"
#include "mxfp8_moe/tiles.cuh"

namespace abiding::mxfp8_moe {
namespace {

constexpr int kThreads = 256, kUnroll = 4;
constexpr int kTileColumns = kTileBlocks * kBlock, kOctetsPerRow = kTileColumns / 8;  // of a tile of scales

template <class T>
__global__ void __launch_bounds__(kThreads) round_kernel(RoundParams p) {
  pdl_wait();
  pdl_launch_dependents();
  const int64_t row_octets = p.k / 8, octets = p.rows * row_octets;
  const int64_t step = int64_t{gridDim.x} * kThreads;
  for (int64_t from = int64_t{blockIdx.x} * kThreads + threadIdx.x; from < octets; from += kUnroll * step) {
    const uint4* in[kUnroll];
    uint4* out[kUnroll];
    uint4 packed[kUnroll];
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) {
      const int64_t octet = from + i * step;
      if (octet >= octets) break;
      const int64_t row = p.rows == 1 ? 0 : octet / row_octets, column = octet - row * row_octets;
      in[i] = reinterpret_cast<const uint4*>(static_cast<const T*>(p.input) + row * p.input_stride) + column;
      out[i] = reinterpret_cast<uint4*>(static_cast<__nv_bfloat16*>(p.out) + row * p.out_stride) + column;
      packed[i] = *in[i];
    }
#pragma unroll
    for (int i = 0; i < kUnroll; ++i)
      if (from + i * step < octets) *out[i] = round_octet<T>(packed[i]);
  }
}

// Where a tile of 128 rows x 4 blocks lies.
struct Place {
  int64_t scale_begin;  // the group's first row among the scales
  int begin, rows;      // of the group
  int first;            // the tile's first row within the group
};

// `tile` is one that exists.
__device__ __forceinline__ Place place_of(const TileTable& table, const Groups& groups, int tile) {
  const int group = table.find(tile);
  const int64_t scale_begin =
      groups.form == Offsets::kProblems ? groups.scale_offsets[group] : int64_t{table.first[group]} * kTileRows;
  return {scale_begin, table.begin[group], table.rows[group], (tile - table.first[group]) * kTileRows};
}

__device__ __forceinline__ Place lone_place(const Groups& groups, const Span& span, int tile) {
  const int64_t scale_begin = groups.form == Offsets::kProblems ? groups.scale_offsets[0] : 0;
  return {scale_begin, static_cast<int>(span.begin), static_cast<int>(span.rows), tile * kTileRows};
}

// Block (x, y) takes columns of tiles x and quarters of their 128 rows y, y + gridDim.y, ...: little enough that a call of few rows
// is spread over the multiprocessors. A lone group needs no table.
constexpr int kQuarters = 4, kQuarterRows = kTileRows / kQuarters;

template <class T, bool kLone>
__global__ void __launch_bounds__(kThreads) quantize_kernel(QuantizeParams p) {
  extern __shared__ int memory[];
  TileTable table(memory, p.groups.count);
  pdl_wait();
  pdl_launch_dependents();
  if constexpr (!kLone) table.build<kThreads>(p.groups, kTileRows);
  const Span lone = kLone ? p.groups.span(0) : Span{};
  const int column = blockIdx.x, tile_columns = gridDim.x;
  const int row_tiles = kLone ? static_cast<int>((lone.rows + kTileRows - 1) / kTileRows) : table.first[p.groups.count];
  const int scale_tiles = static_cast<int>(p.scale_rows.rows / kTileRows);
  const int all = p.clear_rest ? max(row_tiles, scale_tiles) : row_tiles;
  for (int unit = blockIdx.y; unit < all * kQuarters; unit += gridDim.y) {
    const int tile = unit / kQuarters, first_row = unit % kQuarters * kQuarterRows;
    Place place{int64_t{tile} * kTileRows, 0, 0, 0};  // of no rows
    bool held = false;
    if (tile < row_tiles) {
      const Place its = kLone ? lone_place(p.groups, lone, tile) : place_of(table, p.groups, tile);
      held = p.scale_rows.hold(its.scale_begin, its.rows);
      if (held) place = its;
    }
    if (!held && !(p.clear_rest && tile < scale_tiles)) continue;
    uint8_t* scales = p.scales + place.scale_begin * p.scale_rows.columns +
                      (int64_t{place.first} / kTileRows * tile_columns + column) * kTileBytes;
    constexpr int kEach = kQuarterRows * kOctetsPerRow / kThreads;
    const int piece = threadIdx.x % kOctetsPerRow;
    const int64_t k = int64_t{column} * kTileColumns + piece * 8;
    int row[kEach];
    bool exists[kEach];  // the same for the four lanes of a block
    uint4 packed[kEach];
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      row[i] = first_row + (i * kThreads + static_cast<int>(threadIdx.x)) / kOctetsPerRow;
      exists[i] = place.first + row[i] < place.rows && k < p.k;
      const int64_t at = int64_t{place.begin} + place.first + row[i];
      packed[i] = exists[i] ? *reinterpret_cast<const uint4*>(static_cast<const T*>(p.input) + at * p.input_stride + k)
                            : uint4{};
    }
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      uint8_t code;
      const uint2 bytes = quantize_octet<T>(packed[i], code);
      const int64_t at = int64_t{place.begin} + place.first + row[i];
      if (exists[i]) *reinterpret_cast<uint2*>(p.data + at * p.data_stride + k) = bytes;
      // The codes of a row's four blocks are neighbours among the scales.
      uint32_t codes = exists[i] ? uint32_t{code} << piece / 4 * 8 : 0;
      codes |= __shfl_xor_sync(~0u, codes, 4);
      codes |= __shfl_xor_sync(~0u, codes, 8);
      if (piece == 0) *reinterpret_cast<uint32_t*>(scales + scale_at(row[i], 0, kTileBlocks)) = codes;
    }
  }
}

__global__ void __launch_bounds__(kThreads) dequantize_kernel(DequantizeParams p) {
  extern __shared__ int memory[];
  TileTable table(memory, p.groups.count);
  pdl_wait();
  pdl_launch_dependents();
  table.build<kThreads>(p.groups, kTileRows);
  const int tile_columns = static_cast<int>(p.scale_rows.columns / kTileBlocks);
  const int64_t tiles = int64_t{table.first[p.groups.count]} * tile_columns;
  for (int64_t i = blockIdx.x; i < tiles; i += gridDim.x) {
    const int column = static_cast<int>(i % tile_columns);
    const Place place = place_of(table, p.groups, static_cast<int>(i / tile_columns));
    const bool held = p.scale_rows.hold(place.scale_begin, place.rows);
    const uint8_t* scales = p.scales + place.scale_begin * p.scale_rows.columns +
                            (int64_t{place.first} / kTileRows * tile_columns + column) * kTileBytes;
#pragma unroll 4
    for (int octet = threadIdx.x; octet < kTileRows * kOctetsPerRow; octet += kThreads) {
      const int row = octet / kOctetsPerRow, piece = octet % kOctetsPerRow;
      const int64_t k = int64_t{column} * kTileColumns + piece * 8;
      if (place.first + row >= place.rows || k >= p.k) continue;
      const int64_t at = place.begin + place.first + row;
      const uint32_t code = held ? scales[scale_at(row, piece / 4, kTileBlocks)] : 255;
      const uint2 bytes = *reinterpret_cast<const uint2*>(p.data + at * p.data_stride + k);
      uint4 packed = {dequantize_pair(bytes.x, code), dequantize_pair(bytes.x >> 16, code),
                      dequantize_pair(bytes.y, code), dequantize_pair(bytes.y >> 16, code)};
      packed = canonical_nans<__nv_bfloat16>(packed);
      *reinterpret_cast<uint4*>(static_cast<__nv_bfloat16*>(p.out) + at * p.out_stride + k) =
          p.interleaved ? interleave(packed) : packed;
    }
  }
}

// As many blocks as run at once, or as there is work for.
cudaError_t choose_grid(int64_t work, unsigned* grid) {
  int multiprocessors = 0;
  const cudaError_t status = device_attribute(cudaDevAttrMultiProcessorCount, &multiprocessors);
  const int64_t most = int64_t{multiprocessors} * 8;
  *grid = static_cast<unsigned>(work < 1 ? 1 : work < most ? work : most);
  return status;
}

// Tiles that a call can have: every group's last may be part of one.
int64_t most_tiles(const Groups& groups, const ScaleRows& scales, bool all_scales) {
  const int64_t rows = groups.rows / kTileRows + (groups.count < groups.rows ? groups.count : groups.rows);
  const int64_t tiles = all_scales && scales.rows / kTileRows > rows ? scales.rows / kTileRows : rows;
  return tiles * (scales.columns / kTileBlocks);
}

}  // namespace

cudaError_t quantize(const QuantizeParams& p, cudaStream_t stream) {
  unsigned blocks = 0;
  const int64_t units = most_tiles(p.groups, p.scale_rows, p.clear_rest) * kQuarters;
  if (const cudaError_t status = choose_grid(units, &blocks); status != cudaSuccess) return status;
  const unsigned columns = static_cast<unsigned>(p.scale_rows.columns / kTileBlocks);
  if (columns == 0) return cudaSuccess;
  const LaunchConfig config{columns, kThreads, TileTable::bytes(p.groups.count), 1, (blocks + columns - 1) / columns};
  const bool lone = p.groups.count == 1;
  if (p.dtype == DType::kBfloat16)
    return launch(lone ? quantize_kernel<__nv_bfloat16, true> : quantize_kernel<__nv_bfloat16, false>, config, stream,
                  p);
  return launch(lone ? quantize_kernel<__half, true> : quantize_kernel<__half, false>, config, stream, p);
}

cudaError_t dequantize(const DequantizeParams& p, cudaStream_t stream) {
  unsigned grid = 0;
  if (const cudaError_t status = choose_grid(most_tiles(p.groups, p.scale_rows, false), &grid); status != cudaSuccess)
    return status;
  return launch(dequantize_kernel, LaunchConfig{grid, kThreads, TileTable::bytes(p.groups.count)}, stream, p);
}

cudaError_t round(const RoundParams& given, cudaStream_t stream) {
  RoundParams p = given;
  if (p.input_stride == p.k && p.out_stride == p.k) {
    p.k *= p.rows;
    p.rows = 1;
  }
  unsigned grid = 0;
  const int64_t octets = p.rows * (p.k / 8);
  if (const cudaError_t status = choose_grid((octets + kThreads - 1) / kThreads, &grid); status != cudaSuccess)
    return status;
  return p.dtype == DType::kBfloat16 ? launch(round_kernel<__nv_bfloat16>, LaunchConfig{grid, kThreads}, stream, p)
                                     : launch(round_kernel<__half>, LaunchConfig{grid, kThreads}, stream, p);
}

}  // namespace abiding::mxfp8_moe
