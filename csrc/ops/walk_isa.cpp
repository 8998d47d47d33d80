// Walk steps of the walkers at one unit, compiled for each instruction set. The unit's CDF is built
// once, in the first-level caches, and searched by all its walkers; a batch of searches runs in
// lockstep, so that their loads overlap.

#include <algorithm>
#include <bit>
#include <cstring>
#include <type_traits>

#include "core/lanes.h"
#include "ops/lane_shuffle.h"
#include "ops/walk_kernels.h"

namespace pathprune::PATHPRUNE_ISA {
namespace {

constexpr int kBatch = 32;  // searches at once

#if PP_AVX512
// scaled_integer of eight weights: scaling by a power of two is exact, and so is what is cut off.
template <bool kNearest>
PP_INLINE __m512i scaled_integers(__m512d weights, __m512d scale) {
  const __m512d scaled = _mm512_scalef_pd(weights, scale);
  const __m512i whole = _mm512_cvttpd_epu64(scaled);
  if constexpr (!kNearest) return whole;
  constexpr int kTowardsZero = _MM_FROUND_TO_ZERO | _MM_FROUND_NO_EXC;
  const __m512d rest = scaled - _mm512_roundscale_pd(scaled, kTowardsZero);
  const __mmask8 is_up = _mm512_cmp_pd_mask(rest, _mm512_set1_pd(0.5), _CMP_GE_OQ);
  return _mm512_mask_add_epi64(whole, is_up, whole, _mm512_set1_epi64(1));
}

PP_INLINE __m512i prefix_sums(__m512i v) {
  const __m512i zero = _mm512_setzero_si512();
  v = _mm512_add_epi64(v, _mm512_alignr_epi64(v, zero, 7));
  v = _mm512_add_epi64(v, _mm512_alignr_epi64(v, zero, 6));
  return _mm512_add_epi64(v, _mm512_alignr_epi64(v, zero, 4));
}
#endif

// |w|^power of weights that are one entry each. 1 / 0 is infinite, and a weight of 0 counts for 0.
template <int kPower, typename W>
void fill_powers(const W* values, int64_t count, double* weights) {
  for (int64_t i = 0; i < count; ++i) {
    const double m = magnitude(static_cast<double>(widen(values[i])));
    const double value = kPower == 1 ? m : kPower == 2 ? m * m : kPower == 0 ? 1.0 : 1.0 / m;
    const double bounded = value < kLargestWalkWeight ? value : kLargestWalkWeight;
    weights[i] = m == 0 ? 0.0 : bounded;
  }
}

template <typename W>
void fill_powered(const W* values, int64_t count, const WalkRule& rule, double* weights) {
  if (rule.power == 1) {
    fill_powers<1>(values, count, weights);
  } else if (rule.power == 2) {
    fill_powers<2>(values, count, weights);
  } else if (rule.power == 0) {
    fill_powers<0>(values, count, weights);
  } else {
    fill_powers<-1>(values, count, weights);
  }
  for (int64_t i = 0; rule.valid && i < count; ++i) {
    if (!rule.valid[i]) weights[i] = 0;
  }
}

template <typename W>
void fill_weights(const W* values, int64_t candidates, int64_t entries, const WalkRule& rule,
                  double* weights) {
  if (entries == 1 && !rule.valid) {
    fill_powered(values, candidates, rule, weights);
    return;
  }
  for (int64_t i = 0; i < candidates; ++i) {
    weights[i] = candidate_weight(values + i * entries, entries, rule);
  }
}

// The weights of a row: as they were made, or |w| of stored floats, which need not be made.
struct MadeRow {
  const double* weights;
  PP_INLINE double at(int64_t i) const { return weights[i]; }
#if PP_AVX512
  PP_INLINE __m512d eight(int64_t i) const { return _mm512_loadu_pd(weights + i); }
#endif
};

struct StoredRow {
  const float* values;
  PP_INLINE double at(int64_t i) const { return magnitude(static_cast<double>(values[i])); }
#if PP_AVX512
  PP_INLINE __m512d eight(int64_t i) const {
    return _mm512_abs_pd(_mm512_cvtps_pd(_mm256_loadu_ps(values + i)));
  }
#endif
};

double largest_of(const MadeRow& row, int64_t count) {
  double lanes[16] = {};
  int64_t i = 0;
  for (; i + 16 <= count; i += 16) {
    for (int k = 0; k < 16; ++k) lanes[k] = row.at(i + k) > lanes[k] ? row.at(i + k) : lanes[k];
  }
  double largest = 0;
  for (; i < count; ++i) largest = row.at(i) > largest ? row.at(i) : largest;
  for (double lane : lanes) largest = lane > largest ? lane : largest;
  return largest;
}

double largest_of(const StoredRow& row, int64_t count) {
  float largest = 0;
  int64_t i = 0;
#if PP_AVX512
  __m512 lanes[2] = {};
  for (; i + 32 <= count; i += 32) {
    for (int k = 0; k < 2; ++k) {
      const __m512 w = _mm512_loadu_ps(row.values + i + 16 * k);
      lanes[k] = _mm512_max_ps(lanes[k], _mm512_abs_ps(w));
    }
  }
  largest = _mm512_reduce_max_ps(_mm512_max_ps(lanes[0], lanes[1]));
#endif
  for (; i < count; ++i) {
    const float m = row.values[i] < 0 ? -row.values[i] : row.values[i];
    largest = m > largest ? m : largest;
  }
  return static_cast<double>(largest);
}

template <typename Row>
uint64_t sum_of_integers(const Row& row, int64_t count, int scale) {
  uint64_t sum = 0;
  int64_t i = 0;
#if PP_AVX512
  const __m512d by = _mm512_set1_pd(scale);
  __m512i sums[2] = {};
  for (; i + 16 <= count; i += 16) {
    for (int k = 0; k < 2; ++k) {
      sums[k] = _mm512_add_epi64(sums[k], scaled_integers<false>(row.eight(i + 8 * k), by));
    }
  }
  sum = sum_of_lanes(_mm512_add_epi64(sums[0], sums[1]));
#endif
  for (; i < count; ++i) sum += scaled_integer(row.at(i), scale, 0);
  return sum;
}

// Prefix sums of the weights' integers.
template <typename Row>
void fill_prefix_sums(const Row& row, int64_t count, int scale, uint64_t* cdf) {
  uint64_t sum = 0;
  int64_t i = 0;
#if PP_AVX512
  const __m512d by = _mm512_set1_pd(scale);
  const __m512i last = _mm512_set1_epi64(7);
  __m512i before = _mm512_setzero_si512();
  for (; i + 8 <= count; i += 8) {
    const __m512i own = prefix_sums(scaled_integers<true>(row.eight(i), by));
    _mm512_storeu_si512(cdf + i, _mm512_add_epi64(own, before));
    before = _mm512_add_epi64(before, _mm512_permutexvar_epi64(last, own));
  }
  if (i) sum = cdf[i - 1];
#endif
  for (; i < count; ++i) cdf[i] = sum += scaled_integer(row.at(i), scale, 1);
}

// The CDF of a row, padded for `search`; false where all weights are 0.
template <typename Row>
bool fill_cdf(const Row& row, int64_t count, uint64_t* cdf) {
  const double largest = largest_of(row, count);
  if (largest == 0) return false;
  const int rough = rough_scale(count, exponent_of(largest));
  const int scale = final_scale(count, rough, sum_of_integers(row, count, rough));
  fill_prefix_sums(row, count, scale, cdf);
  const uint64_t padded = std::bit_ceil(static_cast<uint64_t>(count));
  for (uint64_t i = count; i < padded; ++i) cdf[i] = UINT64_MAX;
  return true;
}

// The CDF of a unit; false where no candidate could be drawn.
template <typename W>
bool fill_unit(const WalkMatrix& m, const WalkRule& rule, const void* values, int64_t unit,
               const WalkScratch& scratch) {
  const int64_t count = m.candidates();
  const int64_t first_target = m.group_of(unit) * count;
  double* weights = scratch.weights;
  if constexpr (std::is_same_v<W, float>) {
    if (m.entries == 1 && rule.power == 1 && !rule.mass && !rule.gain && !rule.valid) {
      if (fill_cdf(StoredRow{static_cast<const float*>(values)}, count, scratch.cdf)) return true;
    }
  }
  if (rule.mass) {
    std::memcpy(weights, values, count * sizeof(double));
  } else {
    fill_weights(static_cast<const W*>(values), count, m.entries, rule, weights);
  }
  if (rule.gain) {
    const double* gain = rule.gain + first_target;
    for (int64_t i = 0; i < count; ++i) weights[i] = weights[i] * gain[i];
  }
  if (fill_cdf(MadeRow{weights}, count, scratch.cdf)) return true;
  for (int64_t i = 0; i < count; ++i)
    weights[i] = uniform_weight(rule, first_target + i, m.entries);
  return fill_cdf(MadeRow{weights}, count, scratch.cdf);
}

// For each of a batch, the smallest index whose CDF exceeds its draw. `padded` is a power of two,
// up to which the CDF is filled with the largest number.
PP_INLINE void search(const uint64_t* cdf, uint64_t padded, const uint64_t (&draw)[kBatch],
                      uint64_t (&found)[kBatch]) {
#if PP_AVX512
  __m512i at[kBatch / 8], wanted[kBatch / 8];
#pragma GCC unroll 8
  for (int v = 0; v < kBatch / 8; ++v) {
    at[v] = _mm512_setzero_si512();
    wanted[v] = _mm512_loadu_si512(draw + 8 * v);
  }
  for (uint64_t half = padded / 2; half; half /= 2) {
    const __m512i step = _mm512_set1_epi64(static_cast<int64_t>(half));
#pragma GCC unroll 8
    for (int v = 0; v < kBatch / 8; ++v) {
      const __m512i probe = _mm512_i64gather_epi64(at[v], cdf + half - 1, 8);
      const __mmask8 passed = _mm512_cmple_epu64_mask(probe, wanted[v]);
      at[v] = _mm512_mask_add_epi64(at[v], passed, at[v], step);
    }
  }
#pragma GCC unroll 8
  for (int v = 0; v < kBatch / 8; ++v) _mm512_storeu_si512(found + 8 * v, at[v]);
#else
  for (int k = 0; k < kBatch; ++k) found[k] = 0;
  for (uint64_t half = padded / 2; half; half /= 2) {
    for (int k = 0; k < kBatch; ++k) found[k] += cdf[found[k] + half - 1] <= draw[k] ? half : 0;
  }
#endif
}

// Draws for the walkers order[0, count) from the CDF, and calls arrive(walker, index, walk) for
// each.
// What `arrive` will read of an index can be fetched ahead by fetch(index).
template <typename Fetch, typename Arrive>
PP_INLINE void draw_all(const WalkScratch& scratch, int64_t candidates, const WalkRule& rule,
                        const Walkers& walkers, const uint32_t* order, int64_t count,
                        const Fetch& fetch, const Arrive& arrive) {
  const uint64_t total = scratch.cdf[candidates - 1];
  const uint64_t padded = std::bit_ceil(static_cast<uint64_t>(candidates));
  for (int64_t begin = 0; begin < count; begin += kBatch) {
    const int here = static_cast<int>(count - begin < kBatch ? count - begin : kBatch);
    int64_t walk[kBatch] = {};
    uint64_t unit_word[kBatch], entry_word[kBatch], draw[kBatch], found[kBatch];
    for (int k = 0; k < here; ++k) walk[k] = walkers.walks[order[begin + k]];
    for (int k = 0; k < kBatch; ++k) {
      unit_word[k] = walk_word(rule.seed, walk[k], rule.step, WalkWord::kUnit);
      entry_word[k] = walk_word(rule.seed, walk[k], rule.step, WalkWord::kEntry);
    }
    for (int k = 0; k < kBatch; ++k) draw[k] = fixed_draw(unit_word[k], total);
    search(scratch.cdf, padded, draw, found);
    for (int k = 0; k < here; ++k) fetch(static_cast<int64_t>(found[k]));
    for (int k = 0; k < here; ++k) {
      arrive(order[begin + k], static_cast<int64_t>(found[k]), entry_word[k]);
    }
  }
}

#if PP_AVX512
// The draw among `count` weights in sixteen lanes, zeros behind them; -1 where all are 0.
PP_INLINE int64_t draw_among_16(__m512d low, __m512d high, int64_t count, uint64_t word) {
  const double largest = _mm512_reduce_max_pd(_mm512_max_pd(low, high));
  if (largest == 0) return -1;
  const int rough = rough_scale(count, exponent_of(largest));
  const __m512d roughly_by = _mm512_set1_pd(rough);
  const __m512i roughly = _mm512_add_epi64(scaled_integers<false>(low, roughly_by),
                                           scaled_integers<false>(high, roughly_by));
  const int scale = final_scale(count, rough, sum_of_lanes(roughly));
  const __m512d by = _mm512_set1_pd(scale);
  const __m512i last = _mm512_set1_epi64(7);
  const __m512i first = prefix_sums(scaled_integers<true>(low, by));
  const __m512i second = _mm512_add_epi64(prefix_sums(scaled_integers<true>(high, by)),
                                          _mm512_permutexvar_epi64(last, first));
  const __m128i top = _mm512_extracti64x2_epi64(second, 3);
  const uint64_t draw = fixed_draw(word, static_cast<uint64_t>(_mm_extract_epi64(top, 1)));
  const __m512i drawn = _mm512_set1_epi64(static_cast<int64_t>(draw));
  return __builtin_popcount(_mm512_cmple_epu64_mask(first, drawn)) +
         __builtin_popcount(_mm512_cmple_epu64_mask(second, drawn));
}
#endif

// draw_entry of walk.h, on small rows held in registers and the first-level cache.
template <typename W>
PP_INLINE int64_t draw_kernel_entry(const W* kernel, int64_t count, const WalkRule& rule,
                                    uint64_t word) {
  constexpr int64_t kMost = 32;
  if (count == 1) return 0;
  if (count > kMost) return draw_entry(kernel, count, rule, word);
#if PP_AVX512
  if constexpr (std::is_same_v<W, float>) {
    if (count <= 16 && rule.power == 1 && !rule.valid) {
      const auto there = static_cast<__mmask16>(first_lanes(count));
      const __m512 m = _mm512_abs_ps(_mm512_maskz_loadu_ps(there, kernel));
      const __m512d low = _mm512_cvtps_pd(_mm512_castps512_ps256(m));
      const __m512d high = _mm512_cvtps_pd(_mm512_extractf32x8_ps(m, 1));
      const int64_t drawn = draw_among_16(low, high, count, word);
      if (drawn >= 0) return drawn;
    }
  }
#endif
  const int64_t padded = (count + 7) / 8 * 8;  // weights of 0 add nothing to any sum
  double weights[kMost] = {};
  uint64_t cdf[kMost];
  fill_powered(kernel, count, rule, weights);
  const MadeRow row = {weights};
  double largest = largest_of(row, padded);
  if (largest == 0) {
    for (int64_t e = 0; e < count; ++e) weights[e] = rule.is_valid(e);
    largest = 1;
  }
  const int rough = rough_scale(count, exponent_of(largest));
  const int scale = final_scale(count, rough, sum_of_integers(row, padded, rough));
  fill_prefix_sums(row, padded, scale, cdf);
  const uint64_t draw = fixed_draw(word, cdf[padded - 1]);
  int64_t passed = 0;
  for (int64_t e = 0; e < padded; ++e) passed += cdf[e] <= draw;
  return passed;
}

template <typename W>
void move_walkers(const WalkMatrix& m, const WalkRule& rule, const Walkers& walkers,
                  const WalkScratch& scratch, const void* values, int64_t unit,
                  const uint32_t* order, int64_t count) {
  const W* stored = static_cast<const W*>(m.values);
  const int64_t candidates = m.candidates();
  const int64_t first_target = m.group_of(unit) * candidates;
  const int64_t first = m.first(unit), stride = m.stride();
  if (!fill_unit<W>(m, rule, values, unit, scratch)) {
    for (int64_t i = 0; i < count; ++i) {
      walkers.next[order[i]] = -1;
      walkers.edge[order[i]] = -1;
    }
    return;
  }
  const auto fetch = [&](int64_t chosen) {
    if (m.entries > 1) __builtin_prefetch(stored + first + chosen * stride);
  };
  draw_all(scratch, candidates, rule, walkers, order, count, fetch,
           [&](int64_t walker, int64_t chosen, uint64_t word) {
             const int64_t kernel = first + chosen * stride;
             walkers.next[walker] = first_target + chosen;
             walkers.edge[walker] =
                 kernel + draw_kernel_entry(stored + kernel, m.entries, rule, word);
           });
}

template <typename W>
void move_in_field(const WalkMatrix& m, const WalkRule& rule, const WalkField& field,
                   const Walkers& walkers, const WalkScratch& scratch, int64_t unit,
                   int64_t position, const uint32_t* order, int64_t count) {
  const int64_t candidates = m.candidates(), entries = m.entries;
  const int64_t first_target = m.group_of(unit) * candidates;
  const int64_t first = m.first(unit), stride = m.stride();
  const W* values = static_cast<const W*>(m.values) + first;
  const int64_t* leads_to = field.position + position * entries;
  for (int64_t c = 0; c < candidates; ++c) {
    for (int64_t e = 0; e < entries; ++e) {
      scratch.weights[c * entries + e] =
          field_weight(values[c * stride + e], rule.power, field, first_target + c, leads_to[e]);
    }
  }
  if (!fill_cdf(MadeRow{scratch.weights}, candidates * entries, scratch.cdf)) {
    for (int64_t i = 0; i < count; ++i) {
      walkers.next[order[i]] = walkers.edge[order[i]] = field.next_position[order[i]] = -1;
    }
    return;
  }
  const auto fetch = [](int64_t) {};
  draw_all(scratch, candidates * entries, rule, walkers, order, count, fetch,
           [&](int64_t walker, int64_t chosen, uint64_t) {
             const int64_t candidate = chosen / entries, entry = chosen % entries;
             walkers.next[walker] = first_target + candidate;
             walkers.edge[walker] = first + candidate * stride + entry;
             field.next_position[walker] = leads_to[entry];
           });
}

// Calls function(W()) for the type that values are stored in.
template <typename Function>
void by_stored(Storage storage, const Function& function) {
  switch (storage) {
    case Storage::kFloat32:
      return function(float());
    case Storage::kFloat64:
      return function(double());
    case Storage::kBfloat16:
      return function(Bfloat16());
    default:
      return function(Float16());
  }
}

void unit(const WalkMatrix& m, const WalkRule& rule, const Walkers& walkers,
          const WalkScratch& scratch, const void* values, int64_t unit, const uint32_t* order,
          int64_t count) {
  by_stored(m.storage, [&](auto kind) {
    move_walkers<decltype(kind)>(m, rule, walkers, scratch, values, unit, order, count);
  });
}

void field(const WalkMatrix& m, const WalkRule& rule, const WalkField& field,
           const Walkers& walkers, const WalkScratch& scratch, int64_t unit, int64_t position,
           const uint32_t* order, int64_t count) {
  by_stored(m.storage, [&](auto kind) {
    move_in_field<decltype(kind)>(m, rule, field, walkers, scratch, unit, position, order, count);
  });
}

// Columns of single values: squares of a vector's width in registers, what is left value by value.
template <typename W>
void transpose_single(const W* from, int64_t rows, int64_t columns, int64_t count, W* to,
                      int64_t pitch) {
  int64_t row = 0;
  if constexpr (std::is_floating_point_v<W>) {
    constexpr int64_t kW = kWidth<W>, kAhead = 32;
    for (; count % kW == 0 && row + kW <= rows; row += kW) {
      const W* block = from + row * columns;
      for (int64_t r = 0; r < kW; ++r) {
        const W* next = block + (r + kAhead) * columns;
        __builtin_prefetch(next);
        __builtin_prefetch(next + count - 1);
      }
      for (int64_t c = 0; c < count; c += kW) {
        Vector<W> v[kW];
#pragma GCC unroll 16
        for (int64_t r = 0; r < kW; ++r) v[r] = load_vector(block + r * columns + c);
        transpose<W>(v);
#pragma GCC unroll 16
        for (int64_t r = 0; r < kW; ++r) store_vector(to + (c + r) * pitch + row, v[r]);
      }
    }
  }
  for (; row < rows; ++row) {
    for (int64_t c = 0; c < count; ++c) to[c * pitch + row] = from[row * columns + c];
  }
}

void transpose(const WalkMatrix& m, const WalkRule& rule, const WalkScratch& scratch, int64_t group,
               int64_t column, int64_t count) {
  if (rule.mass) {
    return transpose_single(rule.mass + group * m.rows * m.columns + column, m.rows, m.columns,
                            count, static_cast<double*>(scratch.transposed), scratch.pitch);
  }
  by_stored(m.storage, [&](auto kind) {
    using W = decltype(kind);
    const int64_t entries = m.entries, columns = m.columns;
    const W* from = static_cast<const W*>(m.values) + (group * m.rows * columns + column) * entries;
    W* to = static_cast<W*>(scratch.transposed);
    if (entries == 1) return transpose_single(from, m.rows, columns, count, to, scratch.pitch);
    for (int64_t row = 0; row < m.rows; ++row) {
      for (int64_t c = 0; c < count; ++c) {
        const W* values = from + (row * columns + c) * entries;
        W* here = to + c * scratch.pitch + row * entries;
        for (int64_t e = 0; e < entries; ++e) here[e] = values[e];
      }
    }
  });
}

// Sums of kernels of a usual size, each in the order of its entries.
template <int kPower, int kKernel, typename W>
void fill_masses(const W* values, int64_t count, double* mass) {
  for (int64_t i = 0; i < count; ++i) {
    double powers[kKernel];
    fill_powers<kPower>(values + i * kKernel, kKernel, powers);
    double sum = 0;
    for (int e = 0; e < kKernel; ++e) sum += powers[e];
    mass[i] = sum;
  }
}

void mass(const WalkMatrix& m, const WalkRule& rule, int64_t begin, int64_t end, double* mass) {
  by_stored(m.storage, [&](auto kind) {
    const auto* values = static_cast<const decltype(kind)*>(m.values) + begin * m.entries;
    if (m.entries == 9 && rule.power == 1 && !rule.valid) {
      return fill_masses<1, 9>(values, end - begin, mass + begin);
    }
    for (int64_t i = begin; i < end; ++i, values += m.entries) {
      mass[i] = candidate_weight(values, m.entries, rule);
    }
  });
}

}  // namespace

WalkKernels walk_kernels() { return {unit, field, mass, transpose}; }

}  // namespace pathprune::PATHPRUNE_ISA
