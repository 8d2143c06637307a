// Cuts every number of tokens as the Hopper kernel does, and prints what is wrong with it.
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

// Tiles cover the tokens in order, without gaps, none is wider than its kernel allows, none is empty, and together they are
// less than one box wider than the tokens.
static void check_shares(TileKind kind, int tokens) {
  const int most = tokens_of(kind), box = box_of(most), tiles = (tokens + most - 1) / most;
  int next = 0, widest = 0, narrowest = most;
  for (int tile = 0; tile < tiles; ++tile) {
    const Share share = share_of(tokens, box, tiles, tile);
    expect(share.begin == next, "%d tokens, %d at most: tile %d begins at %d, not %d\n", tokens, most, tile,
           share.begin, next);
    expect(share.begin < tokens && share.width > 0 && share.width <= most && share.width % box == 0,
           "%d tokens, %d at most: tile %d is %d wide\n", tokens, most, tile, share.width);
    next = share.begin + share.width;
    widest = share.width > widest ? share.width : widest;
    narrowest = share.width < narrowest ? share.width : narrowest;
  }
  expect(next >= tokens && next < tokens + box, "%d tokens, %d at most: %d are covered\n", tokens, most, next);
  expect(widest - narrowest <= box, "%d tokens, %d at most: %d to %d wide\n", tokens, most, narrowest, widest);
}

int main() {
  for (TileKind kind :
       {TileKind::kSplit, TileKind::kFew, TileKind::kFewTwice, TileKind::kSome, TileKind::kMore, TileKind::kMany})
    for (int tokens = 1; tokens <= 5000; ++tokens) check_shares(kind, tokens);

  const auto plan = [](int64_t rows, int64_t experts, int64_t n, int64_t k) {
    return choose_plan(rows, experts, n, k);
  };
  // One token of a layer with small experts: K is split until there is work for most multiprocessors.
  expect(plan(4, 128, 768, 6144).splits == 4, "4 rows of 6144: %d splits\n", plan(4, 128, 768, 6144).splits);
  expect(plan(4, 128, 6144, 384).splits == 1, "4 rows of 384: %d splits\n", plan(4, 128, 6144, 384).splits);
  for (int64_t rows = 1; rows < 300000; rows += rows < 3000 ? 1 : 777)
    for (int64_t experts : {1L, 8L, 128L, 1024L})
      for (int64_t n : {32L, 768L, 6144L})
        for (int64_t k : {32L, 384L, 6144L}) {
          const Plan p = plan(rows, experts, n, k);
          const bool power = p.splits >= 1 && p.splits <= kMaxSplits && (p.splits & (p.splits - 1)) == 0;
          expect(power && (p.splits == 1 || p.kind == TileKind::kSplit), "%ld rows, %ld experts: %d splits\n", rows,
                 experts, p.splits);
          expect(p.splits == 1 || k / p.splits >= 512, "%ld of K in %d splits\n", k, p.splits);
          const Plan more = plan(rows + 1, experts, n, k);
          expect(rows < experts || tokens_of(more.kind) >= tokens_of(p.kind),
                 "%ld rows and one more, %ld experts: a smaller kind of tile\n", rows, experts);
        }
  return wrong != 0;
}
