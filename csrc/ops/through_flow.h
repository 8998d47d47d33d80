// The through-flow of a weight, which is its score, and what is decided by it. Every pass over the
// weights computes the scores anew, so every pass, instruction set and device must get the same
// bits: each product and each sum is rounded on its own, in the order written here.

#pragma once

#include <cstdint>

#include "core/float_key.h"
#include "core/macros.h"
#include "core/weight_map.h"
#include "ops/weights.h"

namespace pathprune {

// One position or source: s(w), the backward flow g at its row, the flow x that enters its column.
// First s(w) g, which a backward flow through the same weight needs as well. V is a number, or
// several side by side.
template <typename V>
PP_HD V through_flow(V s, V x, V g) {
  return times(times(s, g), x);
}

// Several positions or sources: s(w) times the sum of these over them, t ascending from 0.
template <typename V>
PP_HD V add_pair(V total, V x, V g) {
  return plus(total, times(x, g));
}

template <typename A>
PP_HD A paired_flow(const A* x,  // [positions], x_stride apart
                    int64_t x_stride,
                    const A* g,  // [positions], g_stride apart
                    int64_t g_stride, int64_t positions) {
  A total = A(0);
  for (int64_t t = 0; t < positions; ++t) total = add_pair(total, x[t * x_stride], g[t * g_stride]);
  return total;
}

template <typename A>
PP_HD bool is_finite(A v) {
  return v - v == A(0);
}

// Where a threshold is looked for: the scores with lo <= v <= hi.
template <typename A>
struct Bracket {
  A lo, hi;

  PP_HD bool holds(A v) const { return v >= lo && v <= hi; }
  PP_HD bool is_passed_by(A v) const { return v > hi; }
};

// Which weights stay: those with v >= above, and of those with v >= at_least the ones whose flat
// index is less than `cut`. With the threshold as at_least and the next number as above, the cut
// says which of several equal scores stay.
template <typename A>
struct Stay {
  A at_least, above;
  int64_t cut;

  PP_HD bool operator()(A v, int64_t index) const {
    return v >= above || (v >= at_least && index < cut);
  }
};

// The flows that scores are made of; without them the score is s(w).
template <typename A>
struct ScoreFlows {
  WeightMap s;
  bool has_flows;
  const A* x;  // [groups, positions, pitch]
  const A* g;  // [groups, positions, rows]
  int64_t positions, pitch;
};

}  // namespace pathprune
