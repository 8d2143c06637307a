// Rebasing: the scale blocks of a weight row get one code, the largest of theirs, and their bytes move down. The
// arithmetic is the same bits on host and device.
#pragma once

#include "mxfp8_moe/quantizer.h"

namespace abiding::mxfp8_moe {

// A block counts if it has a nonzero number.
ABIDING_HD bool is_counted(uint8_t code, bool has_number) { return code != 255 && has_number; }

// The code to which a block cannot move: its largest element would become subnormal and lose bits. Then its row stays
// as it is. `exponent` is e4m3's exponent field of that element, 1 if it is subnormal: such blocks never move.
ABIDING_HD int code_too_far(uint8_t code, int exponent) { return code + exponent; }

// What decides about a row: the largest code of the blocks that count, the least that is too far for one of them, and
// whether codes differ.
struct RowCodes {
  int top = 0, too_far = 256;
  bool differ = false;

  ABIDING_HD bool moves() const { return differ && top < too_far; }
  ABIDING_HD bool stays() const { return differ && top >= too_far; }
};

// What the values of a block are multiplied by. Blocks that do not count may be any distance from `top`.
ABIDING_HD int rebase_shift(uint8_t code, uint8_t top) { return top <= code ? 0 : top - code < 15 ? top - code : 15; }

// The byte of an element that moves down by `shift` powers of two: rounded to nearest even, NaN to 0x7F.
ABIDING_HD uint8_t rebase_byte(uint8_t byte, int shift) { return e4m3_encode(e4m3_decode(byte) * pow2(-shift)); }

// 4^(code - 127), the weight of a block's squares.
ABIDING_HD double square_scale(uint8_t code) {
  const uint64_t bits = static_cast<uint64_t>(2 * (code - 127) + 1023) << 52;
  double scale;
  memcpy(&scale, &bits, 8);
  return scale;
}

// The tally of a row: `error` and `norm` are the sums of the squares of what changed, and of the values before.
ABIDING_HD RebaseTally tally_of_row(int64_t row, double error, double norm, int64_t changed, bool stays) {
  return {error, norm, error > 0 ? error / norm : 0, row, changed, stays};
}

// Adds the tally of other rows; of equally bad rows the first one counts.
ABIDING_HD void add(RebaseTally& tally, const RebaseTally& other) {
  tally.error += other.error;
  tally.norm += other.norm;
  tally.changed += other.changed;
  tally.left += other.left;
  if (other.worst > tally.worst || (other.worst == tally.worst && other.worst_row < tally.worst_row))
    tally.worst = other.worst, tally.worst_row = other.worst_row;
}

ABIDING_HD void write_report(const RebaseParams& p, const RebaseTally& all) {
  p.counts[0] = all.changed;
  p.counts[1] = all.left;
  p.counts[2] = all.worst > 0 ? all.worst_row : -1;
  p.errors[0] = all.error > 0 ? sqrt(all.error / all.norm) : 0;
  p.errors[1] = sqrt(all.worst);
}

}  // namespace abiding::mxfp8_moe
