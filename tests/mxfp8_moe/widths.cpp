// Reads grouped GEMMs, a line each: n, k and the rows of each expert. Prints what the sm_90 kernels' tiles of all of
// them lack: the format of rows, the tile shape and the width, a line each.
#include <iostream>
#include <set>
#include <sstream>
#include <string>
#include <tuple>
#include <vector>

#include "mxfp8_moe/grouped_mm_sm90/plan.h"

using namespace abiding::mxfp8_moe;

int main() {
  constexpr int kSms = 132;
  std::set<std::tuple<RowFormat, TileShape, int>> missing;
  const auto shapes_of = [](RowFormat format) -> std::vector<TileShape> {
    if (format == RowFormat::kE4m3)
      return {TileShape::kStreamK_N16, TileShape::kN64, TileShape::kM256_N128, TileShape::kN192_Cluster2};
    return {TileShape::kStreamK_N16, TileShape::kN32,           TileShape::kN64,
            TileShape::kM256_N128,   TileShape::kN160_Cluster2, TileShape::kN256_Cluster2};
  };
  for (const RowFormat format : {RowFormat::kBf16, RowFormat::kE4m3})
    for (const TileShape shape : shapes_of(format))
      for (int width = tile_step(shape); width <= max_tokens(shape); width += tile_step(shape))
        missing.insert({format, shape, width});

  for (std::string line; std::getline(std::cin, line);) {
    std::istringstream numbers(line);
    int64_t n = 0, k = 0, all = 0;
    numbers >> n >> k;
    std::vector<int> rows;
    for (int count; numbers >> count; all += count) rows.push_back(count);
    for (const RowFormat format : {RowFormat::kBf16, RowFormat::kE4m3}) {
      const int ctas = format == RowFormat::kE4m3 ? kSms : 2 * kSms;
      const TileShape shape = choose_plan(format, all, static_cast<int64_t>(rows.size()), n, k, ctas).shape;
      for (const int count : rows) {
        const int tiles = (count + max_tokens(shape) - 1) / max_tokens(shape);
        for (int tile = 0; tile < tiles; ++tile)
          missing.erase({format, shape, token_range(count, tile_step(shape), tiles, tile).n});
      }
    }
  }
  for (const auto& [format, shape, width] : missing)
    std::cout << (format == RowFormat::kE4m3 ? "e4m3" : "bf16") << " rows, shape " << static_cast<int>(shape)
              << ", width " << width << "\n";
}
