// A weight as the ops see it: dense, or packed to its stored values; with a mask of one bit each.

#pragma once

#include <cstdint>

#include "core/macros.h"

namespace pathprune {

enum class Storage : int { kFloat32, kFloat64, kBfloat16, kFloat16 };

struct Bfloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

// A: the type of the flows, scores and sums that belong to weights stored as W.
template <typename W>
struct AccumulateOf {
  using type = float;
};
template <>
struct AccumulateOf<double> {
  using type = double;
};
template <typename W>
using Accumulate = typename AccumulateOf<W>::type;

PP_HD float widen(float w) { return w; }
PP_HD double widen(double w) { return w; }
PP_HD float widen(Bfloat16 w) { return bit_cast<float>(static_cast<uint32_t>(w.bits) << 16); }
// Moving exponent and mantissa into place divides by 2^112, for subnormals too.
PP_HD float widen(Float16 w) {
  const uint32_t sign = static_cast<uint32_t>(w.bits & 0x8000) << 16;
  const uint32_t rest = static_cast<uint32_t>(w.bits & 0x7FFF) << 13;
  const uint32_t finite = bit_cast<uint32_t>(bit_cast<float>(rest) * 0x1p112f);
  return bit_cast<float>(sign | ((w.bits & 0x7C00) == 0x7C00 ? rest | 0x7F800000 : finite));
}

struct Weights {
  const void* values;        // dense: [groups, rows, columns]; packed: the stored values in order,
                             // then 16 of padding, so that a vector may be read anywhere
  Storage storage;           // the type of the values
  const uint16_t* mask;      // [groups, rows, words]; null: all live. Padding bits are zero.
  const uint16_t* layout;    // [groups, rows, words]: which values are stored; null: dense
  const int64_t* row_start;  // [groups * rows + 1]: where each row begins among the stored values
  int64_t groups, rows, columns, words;  // words = ceil(columns / 16)
};

}  // namespace pathprune
