// The CDF of a row of weights, made once and searched by many walkers, compiled for each
// instruction set.
//
// It is a tree of eights: level 0 has the prefix sums, and each level above has the last of every
// eight sums below it. A search compares the eight numbers of one cache line a level; searches of a
// batch go down together, so that their loads overlap.

#pragma once

#include <algorithm>
#include <cstdint>

#include "core/fixed_cdf.h"
#include "core/lanes.h"
#include "core/weight_map.h"
#include "ops/walk_kernels.h"

namespace pathprune::PATHPRUNE_ISA {

// Weights >= 0 in float64, or |w| of stored float32.
template <typename T>
struct Row {
  const T* values;
  PP_INLINE double at(int64_t i) const { return magnitude(static_cast<double>(values[i])); }
#if PP_AVX512
  PP_INLINE __m512d eight(int64_t i) const {
    if constexpr (sizeof(T) == 8) return _mm512_loadu_pd(values + i);
    if constexpr (sizeof(T) == 4) {
      return _mm512_abs_pd(_mm512_cvtps_pd(_mm256_loadu_ps(values + i)));
    }
  }
#endif
};

#if PP_AVX512
// Whether 2^scale is a normal number, by which a product is as exact as a shift.
PP_INLINE bool is_factor(int scale) { return scale >= -1022 && scale <= 1023; }

PP_INLINE __m512d factor_of(int scale) {
  return _mm512_set1_pd(bit_cast<double>(static_cast<int64_t>(scale + 1023) << 52));
}

// scaled_integer of eight weights. Halves are added without rounding up: the integer part of the
// sum is then that of the exact one.
template <bool kNearest>
PP_INLINE __m512i scaled_integers(__m512d weights, __m512d factor) {
  __m512d scaled = weights * factor;
  if constexpr (kNearest) {
    scaled =
        _mm512_add_round_pd(scaled, _mm512_set1_pd(0.5), _MM_FROUND_TO_ZERO | _MM_FROUND_NO_EXC);
  }
  return _mm512_cvttpd_epu64(scaled);
}

PP_INLINE __m512i prefix_sums(__m512i v) {
  const __m512i zero = _mm512_setzero_si512();
  v = _mm512_add_epi64(v, _mm512_alignr_epi64(v, zero, 7));
  v = _mm512_add_epi64(v, _mm512_alignr_epi64(v, zero, 6));
  return _mm512_add_epi64(v, _mm512_alignr_epi64(v, zero, 4));
}
#endif

// The sum, in an order of its own.
template <typename T>
double sum_of(const Row<T>& row, int64_t count) {
  double sum = 0;
  int64_t i = 0;
#if PP_AVX512
  __m512d sums[4] = {};
  for (; i + 32 <= count; i += 32) {
    for (int k = 0; k < 4; ++k) sums[k] += row.eight(i + 8 * k);
  }
  sum = _mm512_reduce_add_pd((sums[0] + sums[1]) + (sums[2] + sums[3]));
#endif
  for (; i < count; ++i) sum += row.at(i);
  return sum;
}

template <typename T>
uint64_t sum_of_integers(const Row<T>& row, int64_t count, int scale) {
  uint64_t sum = 0;
  int64_t i = 0;
#if PP_AVX512
  if (is_factor(scale)) {
    const __m512d factor = factor_of(scale);
    __m512i sums = _mm512_setzero_si512();
    for (; i + 8 <= count; i += 8) {
      sums = _mm512_add_epi64(sums, scaled_integers<false>(row.eight(i), factor));
    }
    sum = sum_of_lanes(sums);
  }
#endif
  for (; i < count; ++i) sum += scaled_integer(row.at(i), scale, 0);
  return sum;
}

// The scale of a row whose weights are not all 0.
template <typename T>
int scale_of(const Row<T>& row, int64_t count, double sum) {
  if (is_scale_certain(count, sum)) return certain_scale(sum);
  double largest = 0;
  for (int64_t i = 0; i < count; ++i) largest = row.at(i) > largest ? row.at(i) : largest;
  const int rough = rough_scale(count, exponent_of(largest));
  return final_scale(count, rough, sum_of_integers(row, count, rough));
}

// Prefix sums of the weights' integers.
template <typename T>
void fill_prefix_sums(const Row<T>& row, int64_t count, int scale, uint64_t* cdf) {
  uint64_t sum = 0;
  int64_t i = 0;
#if PP_AVX512
  if (is_factor(scale)) {
    const __m512d factor = factor_of(scale);
    const __m512i last = _mm512_set1_epi64(7);
    __m512i before = _mm512_setzero_si512();
    for (; i + 8 <= count; i += 8) {
      const __m512i own = prefix_sums(scaled_integers<true>(row.eight(i), factor));
      _mm512_storeu_si512(cdf + i, _mm512_add_epi64(own, before));
      before = _mm512_add_epi64(before, _mm512_permutexvar_epi64(last, own));
    }
    if (i) sum = cdf[i - 1];
  }
#endif
  for (; i < count; ++i) cdf[i] = sum += scaled_integer(row.at(i), scale, 1);
}

// How many of eight ascending numbers are not above the draw.
PP_INLINE int passed_of_eight(const uint64_t* eight, uint64_t draw) {
#if PP_AVX512
  const __m512i drawn = _mm512_set1_epi64(static_cast<int64_t>(draw));
  return __builtin_popcount(_mm512_cmple_epu64_mask(_mm512_loadu_si512(eight), drawn));
#else
  int passed = 0;
  for (int k = 0; k < 8; ++k) passed += eight[k] <= draw;
  return passed;
#endif
}

class CdfTree {
 public:
  static constexpr int kMostLevels = 21;  // 8^21 = 2^63

  // In memory for cdf_room(count) numbers.
  CdfTree(uint64_t* room, int64_t count) : count_(count) {
    level_[0] = room;
    for (int64_t here = count; here > 8; here = eights(here)) {
      level_[levels_] = level_[levels_ - 1] + 8 * eights(here);
      ++levels_;
    }
  }

  // False where all weights are 0.
  template <typename T>
  bool fill(const Row<T>& row) {
    const double sum = sum_of(row, count_);
    if (sum == 0) return false;
    fill_prefix_sums(row, count_, scale_of(row, count_, sum), level_[0]);
    int64_t here = count_;
    for (int l = 0;; ++l) {
      const int64_t padded = 8 * std::max<int64_t>(eights(here), 1);
      for (int64_t i = here; i < padded; ++i) level_[l][i] = UINT64_MAX;
      if (l + 1 == levels_) return true;
      here = padded / 8;
      for (int64_t i = 0; i < here; ++i) level_[l + 1][i] = level_[l][8 * i + 7];
    }
  }

  uint64_t total() const { return level_[0][count_ - 1]; }

  // For the first `count` of a batch, the smallest index whose CDF exceeds the draw.
  PP_INLINE void search(const uint64_t (&draw)[kWalkBatch], int count,
                        int64_t (&found)[kWalkBatch]) const {
    for (int k = 0; k < count; ++k) found[k] = passed_of_eight(level_[levels_ - 1], draw[k]);
    for (int l = levels_ - 2; l >= 0; --l) {
      for (int k = 0; k < count; ++k) {
        found[k] = 8 * found[k] + passed_of_eight(level_[l] + 8 * found[k], draw[k]);
      }
    }
  }

 private:
  int64_t count_;
  int levels_ = 1;
  uint64_t* level_[kMostLevels];
};

}  // namespace pathprune::PATHPRUNE_ISA
