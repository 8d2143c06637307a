// Tiles every number of tokens as the sm_90 grouped GEMM does, and prints what is wrong with it.
#include "mxfp8_moe/grouped_mm_sm90/plan.h"

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

// An expert's tiles cover its tokens in order and without gaps. None is wider than its shape allows, none is empty, and
// together they are less than one step wider than the tokens.
static void check_token_ranges(TileShape shape, int tokens) {
  const int most = max_tokens(shape), step = tile_step(shape), tiles = (tokens + most - 1) / most;
  int next = 0, widest = 0, narrowest = most;
  for (int tile = 0; tile < tiles; ++tile) {
    const TokenRange range = token_range(tokens, step, tiles, tile);
    expect(range.begin == next, "%d tokens, %d at most: tile %d begins at %d, not %d\n", tokens, most, tile,
           range.begin, next);
    expect(range.begin < tokens && range.n > 0 && range.n <= most && range.n % step == 0,
           "%d tokens, %d at most: tile %d is %d wide\n", tokens, most, tile, range.n);
    next = range.begin + range.n;
    widest = range.n > widest ? range.n : widest;
    narrowest = range.n < narrowest ? range.n : narrowest;
  }
  expect(next >= tokens && next < tokens + step, "%d tokens, %d at most: %d are covered\n", tokens, most, next);
  expect(widest - narrowest <= step, "%d tokens, %d at most: %d to %d wide\n", tokens, most, narrowest, widest);
}

int main() {
  for (TileShape shape : {TileShape::kStreamK_N16, TileShape::kN32, TileShape::kN64, TileShape::kM256_N128,
                          TileShape::kN160_Cluster2, TileShape::kN192_Cluster2, TileShape::kN256_Cluster2})
    for (int tokens = 1; tokens <= 5000; ++tokens) check_token_ranges(shape, tokens);

  // Empty calls, and a device that says nothing of itself: any shape, but no division by zero.
  for (const Plan& p :
       {choose_plan(RowFormat::kBf16, 0, 8, 768, 6144, 264), choose_plan(RowFormat::kBf16, 8, 0, 768, 6144, 264),
        choose_plan(RowFormat::kBf16, 8, 8, 768, 6144, 0)})
    expect(p.cluster == 1, "an empty call has clusters of %d\n", p.cluster);

  // The experts of one token, in a layer with few and long tiles: stream-K takes as many CTAs as a cluster may have.
  // With many tiles, or a short K, it gains nothing. 132 SMs have one CTA each for e4m3 tokens, or two.
  for (const int ctas : {132, 264}) {
    expect(choose_plan(RowFormat::kBf16, 4, 128, 768, 6144, ctas).cluster == 8, "4 rows, K = 6144, %d CTAs\n", ctas);
    expect(choose_plan(RowFormat::kBf16, 4, 128, 6144, 384, ctas).cluster == 1, "4 rows, K = 384, %d CTAs\n", ctas);
    expect(choose_plan(RowFormat::kBf16, 1000, 256, 6144, 384, ctas).cluster == 1, "1000 rows, K = 384, %d CTAs\n",
           ctas);
  }
  // With much work, what SMs that a cluster of 4 or 8 leaves idle would do counts for more than a shorter wait.
  for (const int64_t k_tiles : {3, 12, 24, 48})
    for (const int64_t ctas : {132, 264})
      expect(choose_cluster(20 * ctas, k_tiles, ctas) <= 2, "20 tiles of %ld K tiles per CTA\n", k_tiles);
  // With fewer CTAs there is less to fill: never larger clusters.
  for (int64_t tiles = 1; tiles < 5000; tiles += 7)
    for (int64_t k_tiles : {1, 3, 12, 48})
      for (int64_t ctas = 2; ctas < 400; ctas *= 2)
        expect(choose_cluster(tiles, k_tiles, ctas) <= choose_cluster(tiles, k_tiles, 2 * ctas),
               "%ld tiles of %ld K tiles on %ld CTAs\n", tiles, k_tiles, ctas);

  for (int64_t rows = 1; rows < 300000; rows += rows < 3000 ? 1 : 777)
    for (int64_t experts : {1L, 8L, 128L, 1024L})
      for (int64_t n : {32L, 768L, 6144L})
        for (int64_t k : {32L, 384L, 6144L}) {
          const Plan p = choose_plan(RowFormat::kBf16, rows, experts, n, k, 264),
                     more = choose_plan(RowFormat::kBf16, rows + 1, experts, n, k, 264);
          const bool power = p.cluster >= 1 && p.cluster <= 8 && (p.cluster & (p.cluster - 1)) == 0;
          expect(power && (p.cluster == 1 || p.shape == TileShape::kStreamK_N16),
                 "%ld rows, %ld experts: clusters of %d\n", rows, experts, p.cluster);
          expect(rows < experts || max_tokens(more.shape) >= max_tokens(p.shape),
                 "%ld rows and one more, %ld experts: a narrower tile\n", rows, experts);
          // A tile takes at least the tokens that an expert has on average, while any shape does.
          const int64_t average = rows / (rows < experts ? rows : experts);
          expect(max_tokens(p.shape) >= average || average > 256, "%ld tokens per expert in tiles of %d\n", average,
                 max_tokens(p.shape));
          // Beside e4m3 rows the same where rows are few, but for kN32; tiles of more have shapes of their own.
          const Plan fp8 = choose_plan(RowFormat::kE4m3, rows, experts, n, k, 264);
          const bool few = max_tokens(p.shape) <= 64;
          const bool many = fp8.shape == TileShape::kM256_N128 || fp8.shape == TileShape::kN192_Cluster2;
          const TileShape few_shape = p.shape == TileShape::kN32 ? TileShape::kN64 : p.shape;
          expect(few ? fp8.shape == few_shape && fp8.cluster == p.cluster : many && fp8.cluster == 1,
                 "%ld rows, %ld experts: another plan beside e4m3 rows\n", rows, experts);
        }

  // Each shape takes what fills its tiles: the first and the last rows per expert of each.
  struct {
    RowFormat format;
    int tokens;
    TileShape shape;
  } const bounds[] = {{RowFormat::kBf16, 4, TileShape::kStreamK_N16},
                      {RowFormat::kBf16, 5, TileShape::kN32},
                      {RowFormat::kBf16, 12, TileShape::kN32},
                      {RowFormat::kBf16, 13, TileShape::kN64},
                      {RowFormat::kBf16, 40, TileShape::kN64},
                      {RowFormat::kBf16, 41, TileShape::kM256_N128},
                      {RowFormat::kBf16, 105, TileShape::kM256_N128},
                      {RowFormat::kBf16, 106, TileShape::kN160_Cluster2},
                      {RowFormat::kBf16, 132, TileShape::kN160_Cluster2},
                      {RowFormat::kBf16, 133, TileShape::kN256_Cluster2},
                      {RowFormat::kBf16, 5000, TileShape::kN256_Cluster2},
                      {RowFormat::kE4m3, 41, TileShape::kM256_N128},
                      {RowFormat::kE4m3, 105, TileShape::kM256_N128},
                      {RowFormat::kE4m3, 106, TileShape::kN192_Cluster2},
                      {RowFormat::kE4m3, 180, TileShape::kN192_Cluster2},
                      {RowFormat::kE4m3, 181, TileShape::kM256_N128},
                      {RowFormat::kE4m3, 320, TileShape::kM256_N128},
                      {RowFormat::kE4m3, 321, TileShape::kN192_Cluster2},
                      {RowFormat::kE4m3, 5000, TileShape::kN192_Cluster2}};
  for (const auto& [format, tokens, shape] : bounds)
    for (const int64_t experts : {1, 32, 479, 480, 512, 513, 1024}) {
      const bool fp8 = format == RowFormat::kE4m3;
      // Where a shape's tile table has no room beside bf16 rows, the next wider one takes its place.
      TileShape expected = shape;
      if (shape == TileShape::kN32 && experts > 479) expected = TileShape::kN64;
      if (shape == TileShape::kM256_N128 && !fp8 && experts > 512) expected = TileShape::kN160_Cluster2;
      expect(choose_plan(format, tokens * experts, experts, 768, 6144, fp8 ? 132 : 264).shape == expected,
             "%d %s rows per expert, %ld experts: another shape\n", tokens, fp8 ? "e4m3" : "bf16", experts);
    }
  return wrong != 0;
}
