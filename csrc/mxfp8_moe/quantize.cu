// The quantizer and its inverse, and the scales of e4m3 rows. Four lanes hold a scale block (32 elements), each a
// 16-byte vector of 8.
#include "common/launch.cuh"
#include "mxfp8_moe/kernels.h"
#include "mxfp8_moe/quantizer.cuh"
#include "mxfp8_moe/tile_table.cuh"

namespace abiding::mxfp8_moe {
namespace {

constexpr int kThreads = 256, kUnroll = 4;
// CTAs that an SM runs at once, by their registers. Persistent grids have as many: with more, the last ones start when
// the others have ended.
constexpr int kQuantizeCtasPerSm = 6, kRowCtasPerSm = 7, kRoundCtasPerSm = 4, kRowScalesCtasPerSm = 4;
constexpr int kTileColumns = kScaleTileBlocks * kScaleBlock;  // elements of a row that one scale tile covers
constexpr int kVectorsPerRow = kTileColumns / 8;

template <class T>
__global__ void __launch_bounds__(kThreads, kRoundCtasPerSm) round_kernel(RoundParams p) {
  pdl_wait();
  pdl_launch_dependents();
  const int64_t row_vectors = p.k / 8, vectors = p.rows * row_vectors;
  const int64_t step = int64_t{gridDim.x} * kThreads;
  for (int64_t from = int64_t{blockIdx.x} * kThreads + threadIdx.x; from < vectors; from += kUnroll * step) {
    const uint4* in[kUnroll];
    uint4* out[kUnroll];
    uint4 packed[kUnroll];
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) {
      const int64_t vector = from + i * step;
      if (vector >= vectors) break;
      const int64_t row = p.rows == 1 ? 0 : vector / row_vectors, column = vector - row * row_vectors;
      in[i] = reinterpret_cast<const uint4*>(static_cast<const T*>(p.input) + row * p.input_stride) + column;
      out[i] = reinterpret_cast<uint4*>(static_cast<__nv_bfloat16*>(p.out) + row * p.out_stride) + column;
      packed[i] = *in[i];
    }
#pragma unroll
    for (int i = 0; i < kUnroll; ++i)
      if (from + i * step < vectors) *out[i] = round_vec8<T>(packed[i]);
  }
}

// A scale tile (128 rows x 4 scale blocks) and the group that it belongs to.
struct ScaleTile {
  int64_t scale_begin;  // the group's first row among the scales
  int begin, rows;      // the group's first row, and its number of rows
  int first;            // the tile's first row within the group
};

// `tile` must exist.
__device__ __forceinline__ ScaleTile scale_tile(const TileTable& table, const Groups& groups, int tile) {
  const int group = table.find(tile);
  const int64_t scale_begin =
      groups.form == OffsetForm::kProblems ? groups.scale_offsets[group] : int64_t{table.first[group]} * kScaleTileRows;
  return {scale_begin, table.begin[group], table.rows[group], (tile - table.first[group]) * kScaleTileRows};
}

__device__ __forceinline__ ScaleTile scale_tile_of_lone_group(const Groups& groups, const RowRange& range, int tile) {
  const int64_t scale_begin = groups.form == OffsetForm::kProblems ? groups.scale_offsets[0] : 0;
  return {scale_begin, static_cast<int>(range.begin), static_cast<int>(range.count), tile * kScaleTileRows};
}

// CTA (x, y) takes tile column x and, of its rows, the quarters of a tile y, y + gridDim.y, ...: small units, so that a
// call of few rows is spread over the SMs. A lone group needs no tile table.
constexpr int kQuarters = 4, kQuarterRows = kScaleTileRows / kQuarters;

template <class T, bool kLone>
__global__ void __launch_bounds__(kThreads, kQuantizeCtasPerSm) quantize_kernel(QuantizeParams p) {
  extern __shared__ int memory[];
  TileTable table(memory, p.groups.count);
  pdl_wait();
  pdl_launch_dependents();
  if constexpr (!kLone) table.build<kThreads>(p.groups, kScaleTileRows);
  const RowRange lone = kLone ? p.groups.range(0) : RowRange{};
  const int column = blockIdx.x, tile_columns = gridDim.x;
  const int row_tiles =
      kLone ? static_cast<int>((lone.count + kScaleTileRows - 1) / kScaleTileRows) : table.first[p.groups.count];
  const int scale_tiles = static_cast<int>(p.scale_buffer.rows / kScaleTileRows);
  const int all = p.clear_rest ? max(row_tiles, scale_tiles) : row_tiles;
  for (int unit = blockIdx.y; unit < all * kQuarters; unit += gridDim.y) {
    const int tile = unit / kQuarters, first_row = unit % kQuarters * kQuarterRows;
    ScaleTile at_tile{int64_t{tile} * kScaleTileRows, 0, 0, 0};  // of no group
    bool held = false;
    if (tile < row_tiles) {
      const ScaleTile its = kLone ? scale_tile_of_lone_group(p.groups, lone, tile) : scale_tile(table, p.groups, tile);
      held = p.scale_buffer.holds(its.scale_begin, its.rows);
      if (held) at_tile = its;
    }
    if (!held && !(p.clear_rest && tile < scale_tiles)) continue;
    uint8_t* scales = p.scales + at_tile.scale_begin * p.scale_buffer.columns +
                      (int64_t{at_tile.first} / kScaleTileRows * tile_columns + column) * kScaleTileBytes;
    constexpr int kVectorsPerThread = kQuarterRows * kVectorsPerRow / kThreads;
    const int vector_of_row = threadIdx.x % kVectorsPerRow;
    const int64_t k = int64_t{column} * kTileColumns + vector_of_row * 8;
    int row[kVectorsPerThread];
    bool exists[kVectorsPerThread];  // the same for the four lanes of a scale block
    uint4 packed[kVectorsPerThread];
#pragma unroll
    for (int i = 0; i < kVectorsPerThread; ++i) {
      row[i] = first_row + (i * kThreads + static_cast<int>(threadIdx.x)) / kVectorsPerRow;
      exists[i] = at_tile.first + row[i] < at_tile.rows && k < p.k;
      const int64_t at = int64_t{at_tile.begin} + at_tile.first + row[i];
      packed[i] = exists[i] ? *reinterpret_cast<const uint4*>(static_cast<const T*>(p.input) + at * p.input_stride + k)
                            : uint4{};
    }
#pragma unroll
    for (int i = 0; i < kVectorsPerThread; ++i) {
      float x[8];
      unpack<T>(packed[i], x);
      const uint8_t code = block_code(x);
      const uint2 bytes = quantize_vec8(x, code);
      const int64_t at = int64_t{at_tile.begin} + at_tile.first + row[i];
      if (exists[i]) *reinterpret_cast<uint2*>(p.data + at * p.data_stride + k) = bytes;
      // The codes of a row's four scale blocks are adjacent among the scales.
      uint32_t codes = exists[i] ? uint32_t{code} << vector_of_row / 4 * 8 : 0;
      codes |= __shfl_xor_sync(~0u, codes, 4);
      codes |= __shfl_xor_sync(~0u, codes, 8);
      if (vector_of_row == 0) *reinterpret_cast<uint32_t*>(scales + scale_at(row[i], 0, kScaleTileBlocks)) = codes;
    }
  }
}

// One code per row. A CTA takes one row of a scale tile at a time. Of rows of padding, the first one of each quarter of
// a tile clears the codes of all that follow in the quarter. A lone group needs no tile table.
template <class T, bool kLone>
__global__ void __launch_bounds__(kRowThreads, kRowCtasPerSm)
    quantize_rowwise_kernel(const __grid_constant__ QuantizeParams p) {
  extern __shared__ int memory[];
  TileTable table(memory, p.groups.count);
  pdl_wait();
  pdl_launch_dependents();
  if constexpr (!kLone) table.build<kRowThreads>(p.groups, kScaleTileRows);
  const RowRange lone = kLone ? p.groups.range(0) : RowRange{};
  const int tile_columns = static_cast<int>(p.scale_buffer.columns / kScaleTileBlocks);
  const int row_tiles =
      kLone ? static_cast<int>((lone.count + kScaleTileRows - 1) / kScaleTileRows) : table.first[p.groups.count];
  const int scale_tiles = static_cast<int>(p.scale_buffer.rows / kScaleTileRows);
  const int all = p.clear_rest ? max(row_tiles, scale_tiles) : row_tiles;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  for (int64_t unit = blockIdx.x; unit < int64_t{all} * kScaleTileRows; unit += gridDim.x) {
    const int tile = static_cast<int>(unit / kScaleTileRows), row = static_cast<int>(unit % kScaleTileRows);
    ScaleTile at_tile{int64_t{tile} * kScaleTileRows, 0, 0, 0};  // of no group
    bool held = false;
    if (tile < row_tiles) {
      const ScaleTile its = kLone ? scale_tile_of_lone_group(p.groups, lone, tile) : scale_tile(table, p.groups, tile);
      held = p.scale_buffer.holds(its.scale_begin, its.rows);
      if (held) at_tile = its;
    }
    if (!held && !(p.clear_rest && tile < scale_tiles)) continue;
    uint8_t* scales = p.scales + at_tile.scale_begin * p.scale_buffer.columns +
                      int64_t{at_tile.first} / kScaleTileRows * tile_columns * kScaleTileBytes;
    const auto codes_at = [&](int its_row, int column) {
      return reinterpret_cast<uint32_t*>(scales + scale_at(its_row, 0, kScaleTileBlocks) +
                                         int64_t{column} * kScaleTileBytes);
    };
    const int rows = at_tile.rows - at_tile.first;  // from the tile's first one on
    if (row < rows) {
      const int64_t at = int64_t{at_tile.begin} + at_tile.first + row;
      const auto* from = reinterpret_cast<const uint4*>(static_cast<const T*>(p.input) + at * p.input_stride);
      uint8_t* to = p.data + at * p.data_stride;
      const uint32_t codes = same_codes(quantize_row<T, 8>(
          static_cast<int>(p.k / 8), [&](int vector) { return from[vector]; },
          [&](int vector, const float (&x)[8], uint8_t code) {
            *reinterpret_cast<uint2*>(to + vector * 8) = quantize_vec8(x, code);
          }));
      for (int column = threadIdx.x; column < tile_columns; column += kRowThreads)
        *codes_at(row, column) = codes & codes_mask(p.k / kScaleBlock - int64_t{column} * kScaleTileBlocks);
    } else if (row == rows || row % kQuarterRows == 0) {
      const int cleared = row / kQuarterRows * kQuarterRows + lane;
      for (int column = warp; cleared >= row && column < tile_columns; column += kRowThreads / 32)
        *codes_at(cleared, column) = 0;
    }
  }
}

__global__ void __launch_bounds__(kThreads, kQuantizeCtasPerSm) dequantize_kernel(DequantizeParams p) {
  extern __shared__ int memory[];
  TileTable table(memory, p.groups.count);
  pdl_wait();
  table.build<kThreads>(p.groups, kScaleTileRows);
  const int tile_columns = static_cast<int>(p.scale_buffer.columns / kScaleTileBlocks);
  const int64_t tiles = int64_t{table.first[p.groups.count]} * tile_columns;
  for (int64_t i = blockIdx.x; i < tiles; i += gridDim.x) {
    const int column = static_cast<int>(i % tile_columns);
    const ScaleTile at_tile = scale_tile(table, p.groups, static_cast<int>(i / tile_columns));
    const bool held = p.scale_buffer.holds(at_tile.scale_begin, at_tile.rows);
    const uint8_t* scales = p.scales + at_tile.scale_begin * p.scale_buffer.columns +
                            (int64_t{at_tile.first} / kScaleTileRows * tile_columns + column) * kScaleTileBytes;
#pragma unroll 4
    for (int vector = threadIdx.x; vector < kScaleTileRows * kVectorsPerRow; vector += kThreads) {
      const int row = vector / kVectorsPerRow, vector_of_row = vector % kVectorsPerRow;
      const int64_t k = int64_t{column} * kTileColumns + vector_of_row * 8;
      if (at_tile.first + row >= at_tile.rows || k >= p.k) continue;
      const int64_t at = at_tile.begin + at_tile.first + row;
      const uint32_t code = held ? scales[scale_at(row, vector_of_row / 4, kScaleTileBlocks)] : 255;
      const uint2 bytes = *reinterpret_cast<const uint2*>(p.data + at * p.data_stride + k);
      uint4 packed = {dequantize_pair(bytes.x, code), dequantize_pair(bytes.x >> 16, code),
                      dequantize_pair(bytes.y, code), dequantize_pair(bytes.y >> 16, code)};
      packed = canonical_nans<__nv_bfloat16>(packed);
      *reinterpret_cast<uint4*>(static_cast<__nv_bfloat16*>(p.out) + at * p.out_stride + k) =
          p.interleaved ? interleave(packed) : packed;
    }
  }
}

// The scales of e4m3 rows: NaN where a row's codes differ. A CTA has a scale tile: its warps share the columns, whose
// loads are all in flight together up to K = 8192, and a lane has four rows of each. 64 registers per thread at most,
// so that a CTA fits beside those of a GEMM (Config::kSpareThreads).
constexpr int kWarps = kThreads / 32, kColumnsInFlight = 8;

__global__ void __launch_bounds__(kThreads, kRowScalesCtasPerSm)
    row_scales_kernel(const __grid_constant__ RowScalesParams p, bool is_small) {
  extern __shared__ int memory[];
  __shared__ uint32_t differing_rows[kWarps][4];  // a bit per row
  TileTable table(memory, p.groups.count);
  pdl_wait();
  if (is_small) pdl_launch_dependents();
  table.build<kThreads>(p.groups, kScaleTileRows);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int tile_columns = static_cast<int>(p.scale_buffer.columns / kScaleTileBlocks);
  const int blocks = static_cast<int>(p.k / kScaleBlock);
  for (int tile = blockIdx.x; tile < table.first[p.groups.count]; tile += gridDim.x) {
    const ScaleTile at_tile = scale_tile(table, p.groups, tile);
    const bool held = p.scale_buffer.holds(at_tile.scale_begin, at_tile.rows);
    const uint8_t* scales = p.scales + at_tile.scale_begin * p.scale_buffer.columns +
                            int64_t{at_tile.first} / kScaleTileRows * tile_columns * kScaleTileBytes;
    const uint4* codes = reinterpret_cast<const uint4*>(scales) + lane;
    uint4 first_column = {~0u, ~0u, ~0u, ~0u};  // NaN where the buffer does not hold the scales
    uint32_t differing[4] = {};
    if (held) first_column = codes[0];
    for (int from = warp; held && from < tile_columns; from += kWarps * kColumnsInFlight) {
      uint4 loaded[kColumnsInFlight];
#pragma unroll
      for (int i = 0; i < kColumnsInFlight; ++i)
        if (const int column = from + i * kWarps; column < tile_columns)
          loaded[i] = codes[int64_t{column} * (kScaleTileBytes / 16)];
#pragma unroll
      for (int i = 0; i < kColumnsInFlight; ++i) {
        const int column = from + i * kWarps;
        if (column >= tile_columns) continue;
        const uint32_t mask = codes_mask(blocks - column * kScaleTileBlocks);
        differing[0] |= (loaded[i].x ^ same_codes(code_of(first_column.x, 0))) & mask;
        differing[1] |= (loaded[i].y ^ same_codes(code_of(first_column.y, 0))) & mask;
        differing[2] |= (loaded[i].z ^ same_codes(code_of(first_column.z, 0))) & mask;
        differing[3] |= (loaded[i].w ^ same_codes(code_of(first_column.w, 0))) & mask;
      }
    }
    __syncthreads();  // of the tile before, differing_rows may still be read
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t rows = __ballot_sync(~0u, differing[i] != 0);
      if (lane == 0) differing_rows[warp][i] = rows;
    }
    __syncthreads();
    const int row = at_tile.first + static_cast<int>(threadIdx.x);
    if (warp >= 4 || row >= at_tile.rows) continue;
    uint32_t rows = 0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) rows |= differing_rows[w][warp];
    const uint32_t first =
        warp < 2 ? (warp == 0 ? first_column.x : first_column.y) : (warp == 2 ? first_column.z : first_column.w);
    p.out[at_tile.begin + row] = ue8m0_decode(rows >> lane & 1 ? uint8_t{255} : code_of(first, 0));
  }
}

// As many CTAs as run at once, or as there are work items.
cudaError_t choose_grid(int64_t items, int ctas_per_sm, unsigned* grid) {
  int sms = 0;
  const cudaError_t status = sm_count(&sms);
  const int64_t resident = int64_t{sms} * ctas_per_sm;
  *grid = static_cast<unsigned>(items < 1 ? 1 : items < resident ? items : resident);
  return status;
}

// The most scale tiles that a call can have: each group's last one may be partial.
int64_t max_tiles(const Groups& groups, const ScaleBuffer& scales, bool all_scales) {
  const int64_t rows = groups.rows / kScaleTileRows + (groups.count < groups.rows ? groups.count : groups.rows);
  const int64_t tiles = all_scales && scales.rows / kScaleTileRows > rows ? scales.rows / kScaleTileRows : rows;
  return tiles * (scales.columns / kScaleTileBlocks);
}

}  // namespace

cudaError_t run_cuda(const QuantizeParams& p, cudaStream_t stream) {
  unsigned ctas = 0;
  const bool lone = p.groups.count == 1;
  const int64_t tiles = max_tiles(p.groups, p.scale_buffer, p.clear_rest);
  if (p.rowwise) {
    if (p.scale_buffer.columns == 0) return cudaSuccess;
    const int64_t rows = tiles / (p.scale_buffer.columns / kScaleTileBlocks) * kScaleTileRows;
    if (const cudaError_t status = choose_grid(rows, kRowCtasPerSm, &ctas); status != cudaSuccess) return status;
    return dispatch_16_bit(p.dtype, [&](auto tag) {
      using T = CudaType<decltype(tag)>;
      return launch(lone ? quantize_rowwise_kernel<T, true> : quantize_rowwise_kernel<T, false>,
                    LaunchConfig{ctas, kRowThreads, TileTable::bytes(p.groups.count)}, stream, p);
    });
  }
  const int64_t units = tiles * kQuarters;
  if (const cudaError_t status = choose_grid(units, kQuantizeCtasPerSm, &ctas); status != cudaSuccess) return status;
  const unsigned columns = static_cast<unsigned>(p.scale_buffer.columns / kScaleTileBlocks);
  if (columns == 0) return cudaSuccess;
  LaunchConfig config{columns, kThreads, TileTable::bytes(p.groups.count)};
  config.grid_y = (ctas + columns - 1) / columns;
  return dispatch_16_bit(p.dtype, [&](auto tag) {
    using T = CudaType<decltype(tag)>;
    return launch(lone ? quantize_kernel<T, true> : quantize_kernel<T, false>, config, stream, p);
  });
}

cudaError_t run_cuda(const DequantizeParams& p, cudaStream_t stream) {
  unsigned grid = 0;
  const int64_t tiles = max_tiles(p.groups, p.scale_buffer, false);
  if (const cudaError_t status = choose_grid(tiles, kQuantizeCtasPerSm, &grid); status != cudaSuccess) return status;
  return launch(dequantize_kernel, with_max_smem({grid, kThreads, TileTable::bytes(p.groups.count)}), stream, p);
}

cudaError_t run_cuda(const RowScalesParams& p, cudaStream_t stream) {
  if (p.scale_buffer.columns == 0) return cudaSuccess;
  unsigned grid = 0;
  const int64_t tiles = max_tiles(p.groups, p.scale_buffer, false) / (p.scale_buffer.columns / kScaleTileBlocks);
  if (const cudaError_t status = choose_grid(tiles, kRowScalesCtasPerSm, &grid); status != cudaSuccess) return status;
  // As a small grid of the layer does ((*) in layer.cu), unless the GEMM has kN64 tiles, which leave no registers.
  int sms = 0;
  if (const cudaError_t status = sm_count(&sms); status != cudaSuccess) return status;
  const bool is_small = tiles <= sms / 2 && p.groups.rows < 5 * p.groups.count;
  return launch(row_scales_kernel, with_max_smem({grid, kThreads, TileTable::bytes(p.groups.count)}), stream, p,
                is_small);
}

cudaError_t run_cuda(const RoundParams& given, cudaStream_t stream) {
  RoundParams p = given;
  if (p.input_stride == p.k && p.out_stride == p.k) {
    p.k *= p.rows;
    p.rows = 1;
  }
  unsigned grid = 0;
  const int64_t vectors = p.rows * (p.k / 8);
  if (const cudaError_t status = choose_grid((vectors + kThreads - 1) / kThreads, kRoundCtasPerSm, &grid);
      status != cudaSuccess)
    return status;
  return dispatch_16_bit(p.dtype, [&](auto tag) {
    return launch(round_kernel<CudaType<decltype(tag)>>, LaunchConfig{grid, kThreads}, stream, p);
  });
}

}  // namespace abiding::mxfp8_moe
