// One step of many biased random walks, as integers: the element maths that host and device share.
//
// A walker at a unit chooses the smallest candidate whose fixed-point CDF (core/fixed_cdf.h)
// exceeds a 32-bit word of philox(seed, walk, step). The candidate's weight is the sum of |w|^power
// over the kernel entries that are valid, in float64 and in the order of the entries, times its
// gain. Then the kernel entry is drawn the same way among the candidate's own. All of this is a
// pure function of the weights and of (seed, walk, step): no order of work shows in it.

#pragma once

#include <cstdint>

#include "core/fixed_cdf.h"
#include "core/philox.h"
#include "core/weight_map.h"
#include "ops/weights.h"

namespace pathprune {

// Which word of the block at (walk, step) a draw takes.
enum class WalkWord : int { kUnit = 0, kEntry = 1, kBranch = 2, kFlatten = 3 };

PP_HD uint64_t walk_word(uint64_t seed, int64_t walk, int64_t step, WalkWord word) {
  const PhiloxBlock block = philox(seed, static_cast<uint64_t>(walk), static_cast<uint64_t>(step));
  return static_cast<uint64_t>(block.word[static_cast<int>(word)]) << 32;
}

// |w|^power is held below this, so that neither the sum over a kernel nor the product with a gain
// below 2^60 can overflow.
inline constexpr double kLargestWalkWeight = 0x1p960;

// |w|^power for power -1, 0, 1 or 2; 0 for a weight of 0.
PP_HD double walk_weight(double w, int power) {
  const double m = magnitude(w);
  if (m == 0) return 0;
  const double value = power == 1 ? m : power == 2 ? times(m, m) : power == 0 ? 1.0 : 1.0 / m;
  return value < kLargestWalkWeight ? value : kLargestWalkWeight;
}

// A weight tensor as a walk sees it, and the way of the walk through it.
struct WalkMatrix {
  const void* values;  // [groups, rows, columns, entries]
  Storage storage;
  int64_t groups, rows, columns, entries;
  bool to_rows;  // from a column to a row of its group, or the other way

  PP_HD int64_t candidates() const { return to_rows ? rows : columns; }  // of one unit
  PP_HD int64_t units() const { return groups * (to_rows ? columns : rows); }
  PP_HD int64_t group_of(int64_t unit) const { return unit / (to_rows ? columns : rows); }
  // The flat index of a unit's first weight, and from one candidate to the next.
  PP_HD int64_t first(int64_t unit) const {
    return to_rows ? (group_of(unit) * rows * columns + unit % columns) * entries
                   : unit * columns * entries;
  }
  PP_HD int64_t stride() const { return to_rows ? columns * entries : entries; }
};

struct WalkRule {
  int power;
  const double* mass;  // [groups, rows, columns]: candidate_weight of every kernel; null: made here
  const double* gain;  // [groups * candidates] >= 0; null: 1
  const uint8_t* valid;  // [entries] bool; null: all
  uint64_t seed;
  int64_t step;

  PP_HD bool is_valid(int64_t entry) const { return !valid || valid[entry]; }
};

struct Walkers {
  const int64_t* units;  // [count]
  const int64_t* walks;  // [count] their numbers
  int64_t count;
  int64_t* next;  // [count] the unit each goes to, or -1: no candidate has a gain
  int64_t* edge;  // [count] the flat index of the weight it takes, or -1
};

// The backward (or forward) flow beyond a synapse, where walks move over units and positions.
struct WalkField {
  const double* flow;  // [target units, positions] >= 0
  int64_t positions;   // beyond the synapse
  const int64_t*
      position;            // [positions on this side, entries]: where each entry leads; -1: nowhere
  const int64_t* at;       // [count] the position of each walker
  int64_t* next_position;  // [count]
};

// The weight of one kernel entry in the field: |w|^power times the flow where it leads.
template <typename W>
PP_HD double field_weight(W w, int power, const WalkField& field, int64_t target,
                          int64_t position) {
  if (position < 0) return 0;
  return times(walk_weight(static_cast<double>(widen(w)), power),
               field.flow[target * field.positions + position]);
}

// The weight of one candidate, whose entries lie side by side.
template <typename W>
PP_HD double candidate_weight(const W* entries, int64_t count, const WalkRule& rule) {
  double sum = 0;
  for (int64_t e = 0; e < count; ++e) {
    if (!rule.is_valid(e)) continue;
    sum = plus(sum, walk_weight(static_cast<double>(widen(entries[e])), rule.power));
  }
  return sum;
}

// What stands in for a candidate's weight where all are 0: 1 if it could be reached at all.
PP_HD double uniform_weight(const WalkRule& rule, int64_t target, int64_t entries) {
  if (rule.gain && !(rule.gain[target] > 0)) return 0;
  for (int64_t e = 0; e < entries; ++e) {
    if (rule.is_valid(e)) return 1;
  }
  return 0;
}

// The draw among a few weights given one after another by weight_of(index), without a table.
template <typename WeightOf>
PP_HD int64_t draw_among(int64_t count, uint64_t word, const WeightOf& weight_of) {
  double largest = 0;
  for (int64_t i = 0; i < count; ++i) {
    const double weight = weight_of(i);
    if (weight > largest) largest = weight;
  }
  if (largest == 0) return -1;
  const int rough = rough_scale(count, exponent_of(largest));
  uint64_t sum = 0;
  for (int64_t i = 0; i < count; ++i) sum += scaled_integer(weight_of(i), rough, 0);
  const FixedRow row = {final_scale(count, rough, sum), false};
  uint64_t total = 0;
  for (int64_t i = 0; i < count; ++i) total += fixed_weight(weight_of(i), row);
  const uint64_t draw = fixed_draw(word, total);
  int64_t i = 0;
  for (uint64_t cdf = fixed_weight(weight_of(0), row); cdf <= draw;) {
    cdf += fixed_weight(weight_of(++i), row);
  }
  return i;
}

// The kernel entry that a walker takes to the candidate it has chosen, by its entry word.
template <typename W>
PP_HD int64_t draw_entry(const W* entries, int64_t count, const WalkRule& rule, uint64_t word) {
  if (count == 1) return 0;
  const int64_t drawn = draw_among(count, word, [&](int64_t e) {
    return rule.is_valid(e) ? walk_weight(static_cast<double>(widen(entries[e])), rule.power) : 0.0;
  });
  if (drawn >= 0) return drawn;
  return draw_among(count, word, [&](int64_t e) { return rule.is_valid(e) ? 1.0 : 0.0; });
}

// ---- choices among a few: branches, and the units behind a flattening ---------------------------

// Rows of prefix sums, stored one after the other.
struct ChoiceTable {
  const uint64_t* cdf;       // [row_start[rows]]
  const int64_t* row_start;  // [rows + 1]

  PP_HD bool is_row(int64_t row) const {
    return row_start[row] >= 0 && row_start[row] <= row_start[row + 1];
  }
};

// The place within its row that a walker draws, or -1 from an empty row or one of total 0.
PP_HD int64_t choose_in_row(const ChoiceTable& table, int64_t row, int64_t walk, uint64_t seed,
                            int64_t step, WalkWord word) {
  const uint64_t* cdf = table.cdf + table.row_start[row];
  const int64_t count = table.row_start[row + 1] - table.row_start[row];
  if (count == 0 || cdf[count - 1] == 0) return -1;
  return find_in_cdf(cdf, count, fixed_draw(walk_word(seed, walk, step, word), cdf[count - 1]));
}

}  // namespace pathprune
