// Rebasing on the CPU.
#include "common/cpu.h"
#include "mxfp8_moe/rebase.h"

namespace abiding::mxfp8_moe {
namespace {

int largest_byte(const uint8_t* block) {
  int largest = 0;
  for (int i = 0; i < kScaleBlock; ++i) {
    const int magnitude = block[i] & 0x7F;
    if (magnitude != 0x7F && magnitude > largest) largest = magnitude;
  }
  return largest;
}

struct Squares {
  float error = 0, norm = 0;  // in units of the block's scale before
  int64_t changed = 0;
};

// One scale block; `moves` says whether it gets another code, by `shift` powers of two, or NaN alone.
Squares rebase_block(const uint8_t* from, uint8_t* to, bool moves, bool is_nan, int shift) {
  Squares squares;
  for (int i = 0; i < kScaleBlock; ++i) {
    const uint8_t byte = from[i], moved = !moves ? byte : is_nan ? uint8_t{0x7F} : rebase_byte(byte, shift);
    to[i] = moved;
    const float value = e4m3_decode(byte);
    if (is_nan || value != value) continue;
    const float difference = e4m3_decode(moved) * pow2(moves ? shift : 0) - value;
    squares.error += difference * difference;
    squares.norm += value * value;
    squares.changed += difference != 0;
  }
  return squares;
}

RebaseTally rebase_row(const RebaseParams& p, int64_t expert, int64_t row) {
  const int64_t columns = scale_columns(p.k), expert_scales = expert * p.padded_rows() * columns;
  const uint8_t* from = p.weight + expert * p.expert_stride + row * p.stride;
  uint8_t* to = p.out + expert * p.out_expert_stride + row * p.out_stride;
  const auto at = [&](int64_t block) { return expert_scales + scale_at(row, block, columns); };
  const int64_t blocks = row < p.n ? p.k / kScaleBlock : 0;  // rows of padding have codes alone
  RowCodes found;
  for (int64_t i = 0; i < blocks; ++i) {
    const uint8_t code = p.scales[at(i)];
    const int largest = largest_byte(from + i * kScaleBlock);
    found.differ |= code != p.scales[at(0)];
    if (!is_counted(code, largest != 0)) continue;
    found.top = std::max<int>(found.top, code);
    found.too_far = std::min(found.too_far, code_too_far(code, std::max(largest >> 3, 1)));
  }
  const auto top = static_cast<uint8_t>(found.top);
  double error = 0, norm = 0;
  int64_t changed = 0;
  for (int64_t i = 0; i < columns; ++i) {
    const uint8_t code = p.scales[at(i)];
    const bool moves = i < blocks && found.moves() && code != top;
    p.out_scales[at(i)] = moves ? top : code;
    if (i >= blocks) continue;
    const Squares squares =
        rebase_block(from + i * kScaleBlock, to + i * kScaleBlock, moves, code == 255, rebase_shift(code, top));
    error += squares.error * square_scale(code);
    norm += squares.norm * square_scale(code);
    changed += squares.changed;
  }
  return tally_of_row(expert * p.n + row, error, norm, changed, found.stays());
}

}  // namespace

void run_cpu(const RebaseParams& p) {
  const int64_t units_per_expert = p.padded_rows() / kRebaseRows;
  parallel_for(0, p.units(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t unit = begin; unit < end; ++unit) {
      RebaseTally tally{};
      for (int64_t i = 0; i < kRebaseRows; ++i)
        add(tally, rebase_row(p, unit / units_per_expert, unit % units_per_expert * kRebaseRows + i));
      p.tallies[unit] = tally;
    }
  });
  RebaseTally all{};
  for (int64_t unit = 0; unit < p.units(); ++unit) add(all, p.tallies[unit]);
  write_report(p, all);
}

}  // namespace abiding::mxfp8_moe
