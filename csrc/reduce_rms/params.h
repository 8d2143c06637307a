// What the checks hand to a kernel. No torch here.
#pragma once

#include "common/dtypes.h"
#include "peer/protocol.h"

namespace abiding::reduce_rms {

// One or two tensors (q and k) that are normalized over their full width, of which each rank holds `width` columns.
constexpr int kMaxParts = 2;
struct Part {
  const void* weight;
  void* out;  // dense
  int64_t width;
  float inverse_full_width;  // 1 / (ranks x width); filled in by the launcher
};

// In the order in which the kernel reads them: parameters are loaded from constant memory piece by piece.
struct ReduceRmsParams {
  const void* input;       // the parts are side by side in its rows
  int64_t input_stride;    // elements from row to row
  int64_t tokens;          // rows
  int vectors[kMaxParts];  // per row of each part: 16-byte vectors, or elements if unaligned; filled in by the launcher
  float eps;
  DType dtype;
  int part_count;
  alignas(16) Part parts[kMaxParts];
};

inline peer::Call call_of(const ReduceRmsParams& p) {
  return {p.part_count == 2 ? peer::Op::kQkNorm : peer::Op::kRmsNorm,
          p.dtype,
          p.tokens,
          {p.parts[0].width, p.parts[1].width}};
}

// Upstream's workspace, a device array of 3 N + 2 pointers. [2N, 3N): the ranks' buffers, each of three slots whose
// words are -0.0 if empty; the third slot is not used here. [3N]: three counters {CTAs that are done, -, epoch}. [3N +
// 1]: two sizes {-, bytes of a slot}.
struct TableParams {
  void* const* pointers;
  int rank, ranks;
  uint64_t timeout_ns;
};

// In such a slot each source has a region, with one word per token and part.
constexpr uint32_t kTableEmpty = 0x80000000;

// How a CTA is tiled: `tokens` tokens at a time, each with `warps_per_token` warps, whose threads hold
// `vectors_per_thread` vectors of the row in registers. One vector per thread has the least latency, so it comes first;
// with more, a CTA takes more tokens. 0 vectors: the row does not fit the registers and is read twice. If there are
// more tokens than the CTAs can take at once, each warp takes several tokens one after another: rows are held in shared
// memory (kRowInSmem) if `smem_bytes` has room for enough warps, or else are read twice (kRowReadTwice).
// Invariant: all ranks choose the same tile, because it depends on sizes alone and their GPUs are of one kind.
constexpr int kMaxCtaWarps = 32, kMinSmemWarps = 8;
constexpr int kRowInSmem = -1, kRowReadTwice = -2;  // values of vectors_per_thread
struct CtaTile {
  int vectors_per_thread, warps_per_token, tokens;
  constexpr bool warps_loop_over_tokens() const { return vectors_per_thread < 0; }
};
constexpr CtaTile choose_cta_tile(int64_t vectors, int64_t tokens, int max_ctas, int64_t smem_bytes) {
  const int64_t tokens_per_cta = tokens > max_ctas ? (tokens + max_ctas - 1) / max_ctas : 1;
  for (const int per_thread : {1, 2, 4}) {
    const int64_t warps = vectors > 32 * per_thread ? (vectors + 32 * per_thread - 1) / (32 * per_thread) : 1;
    if (tokens_per_cta * warps <= kMaxCtaWarps)
      return {per_thread, static_cast<int>(warps), static_cast<int>(tokens_per_cta)};
  }
  if (tokens_per_cta == 1) return {0, kMaxCtaWarps, 1};
  const int warps = tokens_per_cta < kMaxCtaWarps ? static_cast<int>(tokens_per_cta) : kMaxCtaWarps;
  if (vectors * 16 * warps <= smem_bytes) return {kRowInSmem, 1, warps};
  const int64_t rows = smem_bytes / (vectors * 16);
  return rows >= kMinSmemWarps ? CtaTile{kRowInSmem, 1, static_cast<int>(rows)} : CtaTile{kRowReadTwice, 1, warps};
}
constexpr bool is_tile(const CtaTile& tile, int vectors_per_thread, int warps_per_token, int tokens) {
  return tile.vectors_per_thread == vectors_per_thread && tile.warps_per_token == warps_per_token &&
         tile.tokens == tokens;
}
constexpr int64_t kHopperSmemBytes = 227 << 10;
static_assert(is_tile(choose_cta_tile(448, 1, 128, kHopperSmemBytes), 1, 14, 1) &&
              is_tile(choose_cta_tile(448, 256, 128, kHopperSmemBytes), 1, 14, 2) &&
              is_tile(choose_cta_tile(448, 1024, 128, kHopperSmemBytes), 4, 4, 8) &&
              is_tile(choose_cta_tile(448, 2048, 128, kHopperSmemBytes), kRowInSmem, 1, 16) &&
              is_tile(choose_cta_tile(448, 9999, 128, kHopperSmemBytes), kRowInSmem, 1, 32) &&
              is_tile(choose_cta_tile(1000, 9999, 128, kHopperSmemBytes), kRowInSmem, 1, 14) &&
              is_tile(choose_cta_tile(2000, 9999, 128, kHopperSmemBytes), kRowReadTwice, 1, 32) &&
              is_tile(choose_cta_tile(2000, 256, 128, kHopperSmemBytes), 4, 16, 2) &&
              is_tile(choose_cta_tile(4097, 1, 128, kHopperSmemBytes), 0, 32, 1) &&
              is_tile(choose_cta_tile(3, 9999, 128, kHopperSmemBytes), kRowInSmem, 1, 32) &&
              is_tile(choose_cta_tile(0, 1, 1, kHopperSmemBytes), 1, 1, 1));

// Invariant: a CTA's region has room for the words of a whole tile.
static_assert(peer::region_bytes(peer::kScalars, peer::kMaxRanks, peer::kMaxCtas) >=
              kMaxCtaWarps * kMaxParts * static_cast<int64_t>(sizeof(float)));

}  // namespace abiding::reduce_rms
