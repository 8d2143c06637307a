// Tiles every number of tokens as the sm_90 grouped GEMM does, and prints what is wrong with it.
#include "mxfp8_moe/plan.h"

#include <cstdio>
#include <initializer_list>

using namespace abiding::mxfp8_moe;

static int wrong = 0;
template <class... Values>
void expect(bool ok, const char* format, Values... values) {
  if (ok) return;
  ++wrong;
  std::printf(format, values...);
}

// An expert's tiles cover its tokens in order and without gaps. None is wider than its shape allows, none is empty, and together they
// are less than one TMA box wider than the tokens.
static void check_token_ranges(TileShape shape, int tokens) {
  const int most = max_tokens(shape), box = tma_box_rows(most), tiles = (tokens + most - 1) / most;
  int next = 0, widest = 0, narrowest = most;
  for (int tile = 0; tile < tiles; ++tile) {
    const TokenRange range = token_range(tokens, box, tiles, tile);
    expect(range.begin == next, "%d tokens, %d at most: tile %d begins at %d, not %d\n", tokens, most, tile,
           range.begin, next);
    expect(range.begin < tokens && range.n > 0 && range.n <= most && range.n % box == 0,
           "%d tokens, %d at most: tile %d is %d wide\n", tokens, most, tile, range.n);
    next = range.begin + range.n;
    widest = range.n > widest ? range.n : widest;
    narrowest = range.n < narrowest ? range.n : narrowest;
  }
  expect(next >= tokens && next < tokens + box, "%d tokens, %d at most: %d are covered\n", tokens, most, next);
  expect(widest - narrowest <= box, "%d tokens, %d at most: %d to %d wide\n", tokens, most, narrowest, widest);
}

int main() {
  for (TileShape shape : {TileShape::kSplitK_N16, TileShape::kN64, TileShape::kN64_2Ctas, TileShape::kM256_N128,
                          TileShape::kN160_Cluster2, TileShape::kN256_Cluster2})
    for (int tokens = 1; tokens <= 5000; ++tokens) check_token_ranges(shape, tokens);

  const auto plan = [](int64_t rows, int64_t experts, int64_t n, int64_t k) {
    return choose_plan(rows, experts, n, k);
  };
  // No rows or no experts: any shape, but no division by zero.
  expect(plan(0, 8, 768, 6144).splits == 1 && plan(8, 0, 768, 6144).splits == 1, "empty calls are split\n");
  // One token of a layer with small experts: K is split until most SMs have a tile.
  expect(plan(4, 128, 768, 6144).splits == 4, "4 rows of 6144: %d splits\n", plan(4, 128, 768, 6144).splits);
  expect(plan(4, 128, 6144, 384).splits == 1, "4 rows of 384: %d splits\n", plan(4, 128, 6144, 384).splits);
  for (int64_t rows = 1; rows < 300000; rows += rows < 3000 ? 1 : 777)
    for (int64_t experts : {1L, 8L, 128L, 1024L})
      for (int64_t n : {32L, 768L, 6144L})
        for (int64_t k : {32L, 384L, 6144L}) {
          const Plan p = plan(rows, experts, n, k);
          const bool power = p.splits >= 1 && p.splits <= kMaxSplits && (p.splits & (p.splits - 1)) == 0;
          expect(power && (p.splits == 1 || p.shape == TileShape::kSplitK_N16), "%ld rows, %ld experts: %d splits\n",
                 rows, experts, p.splits);
          expect(p.splits == 1 || k / p.splits >= 512, "%ld of K in %d splits\n", k, p.splits);
          const Plan more = plan(rows + 1, experts, n, k);
          expect(rows < experts || max_tokens(more.shape) >= max_tokens(p.shape),
                 "%ld rows and one more, %ld experts: a narrower tile\n", rows, experts);
        }
  return wrong != 0;
}
