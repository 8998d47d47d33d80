// Discrete distributions as integers. The weights of a row become integers, their prefix sums are
// the row's CDF, and a draw is the smallest index whose CDF exceeds an integer made from a random
// word. Integer sums are associative, so every way of computing them - serial, parallel, in blocks,
// on any device - gives the same draw.
//
// A weight w becomes round(w * 2^scale), half up. The scale is the largest that a bound on the
// row's sum allows, so for rows of up to 2^31 entries
//   - the total stays below 2^64;
//   - every probability is within 2^-31 of the true one: with n entries the rounding moves an entry
//     by at most 1/2 and the total, which is at least 2/3 * 2^62, by at most n/2.
// A zero weight has probability exactly 0. A row of zeros is drawn from uniformly.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <span>

#include "core/macros.h"

namespace pathprune {

struct FixedRow {
  int scale;     // a weight w becomes round(w * 2^scale)
  bool uniform;  // all weights are zero: each entry becomes 1
};

PP_HD uint64_t multiply_high(uint64_t a, uint64_t b) {
#if defined(__CUDA_ARCH__)
  return __umul64hi(a, b);
#else
  __extension__ using uint128 = unsigned __int128;
  return static_cast<uint64_t>((static_cast<uint128>(a) * b) >> 64);
#endif
}

// floor(weight * 2^scale + half_ulps / 2): half_ulps 0 rounds down, 1 to the nearest. Exact, for
// finite weight >= 0 and a result below 2^64.
PP_HD uint64_t scaled_integer(double weight, int scale, int half_ulps) {
  const uint64_t bits = bit_cast<uint64_t>(weight + 0.0);  // -0 + 0 is +0
  const int exponent = static_cast<int>(bits >> 52);
  const uint64_t fraction = bits & ((uint64_t{1} << 52) - 1);
  const uint64_t mantissa = exponent ? fraction | uint64_t{1} << 52 : fraction;
  const int shift = (exponent ? exponent : 1) - 1075 + scale;
  if (shift >= 0) return mantissa << shift;
  if (shift < -54) return 0;
  return (mantissa + (static_cast<uint64_t>(half_ulps) << (-shift - 1))) >> -shift;
}

// The integer of one weight.
PP_HD uint64_t fixed_weight(double weight, const FixedRow& row) {
  return row.uniform ? 1 : scaled_integer(weight, row.scale, 1);
}

// How many binary digits x has; 0 has none.
PP_HD int digits_of(uint64_t x) {
  if (x == 0) return 0;
#if defined(__CUDA_ARCH__)
  return 64 - __clzll(static_cast<int64_t>(x));
#else
  return 64 - __builtin_clzll(x);
#endif
}

// floor(log2(weight)), for finite weight > 0.
PP_HD int exponent_of(double weight) {
  const uint64_t bits = bit_cast<uint64_t>(weight);
  const int exponent = static_cast<int>(bits >> 52);
  return exponent ? exponent - 1023 : digits_of(bits) - 1075;
}

// The scale at which a row's first, rough sum is taken: n integers of a largest weight below
// 2^(largest_exponent + 1), each rounded down, sum to at most 2^64 - n.
PP_HD int rough_scale(int64_t count, int largest_exponent) {
  const int log2_count = digits_of(static_cast<uint64_t>(count) - 1);  // rounded up
  return 63 - log2_count - largest_exponent;
}

// The row's final scale, from the sum of scaled_integer(w, rough, 0) over its entries.
PP_HD int final_scale(int64_t count, int rough, uint64_t rough_sum) {
  const uint64_t bound = rough_sum + static_cast<uint64_t>(count - 1);
  return rough + 63 - digits_of(bound);  // sum of w * 2^rough < bound + 1
}

// Whether a row's final scale follows from the sum of its weights in float64, in whatever order it
// was formed: neither its rounding (a share of count * 2^-53) nor what the rough integers lack (a
// share of count^2 * 2^-62) can carry it over a power of two.
PP_HD bool is_scale_certain(int64_t count, double sum) {
  constexpr uint64_t kTop = (1 << 20) - 1;  // the first 20 bits behind the point
  const uint64_t bits = bit_cast<uint64_t>(sum), top = bits >> 32 & kTop;
  const int exponent = static_cast<int>(bits >> 52) - 1023;
  return count <= 1 << 20 && top != 0 && top != kTop && exponent > -960 && exponent < 1023;
}

PP_HD int certain_scale(double sum) { return 62 - exponent_of(sum); }

// The draw of a row with this total: `word` is 64 random bits.
PP_HD uint64_t fixed_draw(uint64_t word, uint64_t total) { return multiply_high(word, total); }

// The smallest index whose CDF (inclusive prefix sums) exceeds the draw. The total exceeds it.
PP_HD int64_t find_in_cdf(const uint64_t* cdf, int64_t count, uint64_t draw) {
  int64_t low = 0;
  int64_t high = count - 1;
  while (low < high) {
    const int64_t middle = low + (high - low) / 2;
    if (cdf[middle] > draw) {
      high = middle;
    } else {
      low = middle + 1;
    }
  }
  return low;
}

// ---- a row at a time, on the host -----------------------------------------------------------

// Whether a distribution can be made of these weights: none negative, infinite or NaN.
inline bool are_fixed_weights(std::span<const double> weights) {
  return std::all_of(weights.begin(), weights.end(),
                     [](double w) { return w >= 0 && w < INFINITY; });
}

inline FixedRow make_fixed_row(std::span<const double> weights) {
  const auto largest = std::max_element(weights.begin(), weights.end());
  if (largest == weights.end() || *largest == 0) return {0, true};
  const int64_t count = static_cast<int64_t>(weights.size());
  const int rough = rough_scale(count, exponent_of(*largest));
  uint64_t sum = 0;
  for (double weight : weights) sum += scaled_integer(weight, rough, 0);
  return {final_scale(count, rough, sum), false};
}

// Fills cdf with the inclusive prefix sums; returns how many non-zero weights became 0.
inline int64_t fill_cdf(std::span<const double> weights, const FixedRow& row, uint64_t* cdf) {
  uint64_t sum = 0;
  int64_t lost = 0;
  for (double weight : weights) {
    const uint64_t integer = fixed_weight(weight, row);
    lost += integer == 0 && weight != 0;
    *cdf++ = sum += integer;
  }
  return lost;
}

}  // namespace pathprune
