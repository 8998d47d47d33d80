// Walk steps of the walkers at one unit, compiled for each instruction set. The unit's CDF is built
// once, in the first-level caches, and searched by all its walkers.

#include <algorithm>
#include <cstring>
#include <type_traits>

#include "core/lanes.h"
#include "ops/lane_cdf.h"
#include "ops/lane_shuffle.h"
#include "ops/walk_kernels.h"

namespace pathprune::PATHPRUNE_ISA {
namespace {

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

// The CDF of a unit; false where no candidate could be drawn.
template <typename W>
bool fill_unit(const WalkMatrix& m, const WalkRule& rule, const void* values, int64_t unit,
               const WalkScratch& scratch, CdfTree& cdf) {
  const int64_t count = m.candidates();
  const int64_t first_target = m.group_of(unit) * count;
  double* weights = scratch.weights;
  const Row<double> made = {weights};
  if (rule.mass) {
    const auto* mass = static_cast<const double*>(values);
    if (!rule.gain && cdf.fill(Row<double>{mass})) return true;
    std::memcpy(weights, mass, count * sizeof(double));
  } else {
    if constexpr (std::is_same_v<W, float>) {
      if (m.entries == 1 && rule.power == 1 && !rule.gain && !rule.valid) {
        if (cdf.fill(Row<float>{static_cast<const float*>(values)})) return true;
      }
    }
    fill_weights(static_cast<const W*>(values), count, m.entries, rule, weights);
  }
  if (rule.gain) {
    const double* gain = rule.gain + first_target;
    for (int64_t i = 0; i < count; ++i) weights[i] = weights[i] * gain[i];
  }
  if (cdf.fill(made)) return true;
  for (int64_t i = 0; i < count; ++i)
    weights[i] = uniform_weight(rule, first_target + i, m.entries);
  return cdf.fill(made);
}

// Words 0 and 1 of the philox block of each walk of a batch at a step, as 64 bits whose lower half
// is 0: what walk_word gives.
PP_INLINE void walk_words(uint64_t seed, int64_t step, const int64_t (&walk)[kWalkBatch],
                          uint64_t (&first)[kWalkBatch], uint64_t (&second)[kWalkBatch]) {
#if PP_AVX512
  // Words lie in the lower halves of 64-bit lanes; the upper ones are never looked at.
  const auto of_all = [](uint64_t word) { return _mm512_set1_epi64(static_cast<int64_t>(word)); };
  const __m512i by0 = of_all(kPhiloxMultiplier[0]), by1 = of_all(kPhiloxMultiplier[1]);
  constexpr int kXor = 0x96;
  __m512i w[kWalkBatch / 8][4];
#pragma GCC unroll 8
  for (int v = 0; v < kWalkBatch / 8; ++v) {
    w[v][0] = _mm512_loadu_si512(walk + 8 * v);
    w[v][1] = _mm512_srli_epi64(w[v][0], 32);
    w[v][2] = of_all(static_cast<uint64_t>(step));
    w[v][3] = of_all(static_cast<uint64_t>(step) >> 32);
  }
  uint32_t key[2] = {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)};
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const __m512i key0 = of_all(key[0]), key1 = of_all(key[1]);
#pragma GCC unroll 8
    for (int v = 0; v < kWalkBatch / 8; ++v) {
      const __m512i product0 = _mm512_mul_epu32(w[v][0], by0);
      const __m512i product1 = _mm512_mul_epu32(w[v][2], by1);
      const __m512i high0 = _mm512_srli_epi64(product0, 32);
      const __m512i high1 = _mm512_srli_epi64(product1, 32);
      w[v][0] = _mm512_ternarylogic_epi64(high1, w[v][1], key0, kXor);
      w[v][2] = _mm512_ternarylogic_epi64(high0, w[v][3], key1, kXor);
      w[v][1] = product1;
      w[v][3] = product0;
    }
    key[0] += kPhiloxWeyl[0];
    key[1] += kPhiloxWeyl[1];
  }
#pragma GCC unroll 8
  for (int v = 0; v < kWalkBatch / 8; ++v) {
    _mm512_storeu_si512(first + 8 * v, _mm512_slli_epi64(w[v][0], 32));
    _mm512_storeu_si512(second + 8 * v, _mm512_slli_epi64(w[v][1], 32));
  }
#else
  for (int k = 0; k < kWalkBatch; ++k) {
    first[k] = walk_word(seed, walk[k], step, WalkWord::kUnit);
    second[k] = walk_word(seed, walk[k], step, WalkWord::kEntry);
  }
#endif
}

// Up to a batch of walkers and what they draw from a CDF.
struct Drawn {
  int64_t found[kWalkBatch];
  uint64_t entry_word[kWalkBatch];
};

PP_INLINE void draw(const CdfTree& cdf, const WalkRule& rule, const Walkers& walkers,
                    const uint32_t* order, int count, Drawn& drawn) {
  const uint64_t total = cdf.total();
  int64_t walk[kWalkBatch] = {};
  uint64_t draw[kWalkBatch];
  for (int k = 0; k < count; ++k) walk[k] = walkers.walks[order[k]];
  walk_words(rule.seed, rule.step, walk, draw, drawn.entry_word);
  for (int k = 0; k < count; ++k) draw[k] = fixed_draw(draw[k], total);
  cdf.search(draw, count, drawn.found);
}

PP_INLINE int batch_of(int64_t count, int64_t begin) {
  return static_cast<int>(std::min<int64_t>(count - begin, kWalkBatch));
}

#if PP_AVX512
// |w| of entries [begin, end), at most eight, and zeros. What lies beyond the kernel is not
// touched, not even masked out: its cache line was not fetched.
PP_INLINE __m256 magnitudes_of(const float* kernel, int64_t begin, int64_t end) {
  if (begin >= end) return _mm256_setzero_ps();
  const int64_t count = end - begin;
  const auto there = static_cast<__mmask8>(first_lanes(count));
  __m256 v;
  if (end < 8) {
    v = _mm256_maskz_loadu_ps(there, kernel + begin);
  } else {
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    const __m256i from = _mm256_add_epi32(lane, _mm256_set1_epi32(static_cast<int>(8 - count)));
    v = _mm256_maskz_permutexvar_ps(there, from, _mm256_loadu_ps(kernel + end - 8));
  }
  return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), v);
}

// The draw among sixteen weights whose sum is `sum`, if that tells their scale; else -1.
PP_INLINE int64_t draw_among_16(__m512d low, __m512d high, double sum, uint64_t word) {
  if (!is_scale_certain(16, sum)) return -1;
  const __m512d factor = factor_of(certain_scale(sum));
  const __m512i last = _mm512_set1_epi64(7);
  const __m512i first = prefix_sums(scaled_integers<true>(low, factor));
  const __m512i second = _mm512_add_epi64(prefix_sums(scaled_integers<true>(high, factor)),
                                          _mm512_permutexvar_epi64(last, first));
  const __m128i top = _mm512_extracti64x2_epi64(second, 3);
  const uint64_t draw = fixed_draw(word, static_cast<uint64_t>(_mm_extract_epi64(top, 1)));
  const __m512i drawn = _mm512_set1_epi64(static_cast<int64_t>(draw));
  return __builtin_popcount(_mm512_cmple_epu64_mask(first, drawn)) +
         __builtin_popcount(_mm512_cmple_epu64_mask(second, drawn));
}
#endif

// draw_entry of walk.h, on small rows held in registers and the first-level cache. `mass`: the sum
// of the entries' weights, however formed, or 0 where it is not known.
template <typename W>
PP_INLINE int64_t draw_kernel_entry(const W* kernel, int64_t count, const WalkRule& rule,
                                    double mass, uint64_t word) {
  constexpr int64_t kMost = 32;
  if (count == 1) return 0;
  if (count > kMost) return draw_entry(kernel, count, rule, word);
#if PP_AVX512
  if constexpr (std::is_same_v<W, float>) {
    if (count <= 16 && rule.power == 1 && !rule.valid) {
      const __m512d low = _mm512_cvtps_pd(magnitudes_of(kernel, 0, std::min<int64_t>(count, 8)));
      const __m512d high = _mm512_cvtps_pd(magnitudes_of(kernel, 8, count));
      const double sum = mass > 0 ? mass : _mm512_reduce_add_pd(low + high);
      const int64_t drawn = draw_among_16(low, high, sum, word);
      if (drawn >= 0) return drawn;
    }
  }
#endif
  const int64_t padded = (count + 7) / 8 * 8;  // weights of 0 add nothing to any sum
  double weights[kMost] = {};
  uint64_t cdf[kMost];
  fill_powered(kernel, count, rule, weights);
  const Row<double> row = {weights};
  double sum = sum_of(row, padded);
  if (sum == 0) {
    for (int64_t e = 0; e < count; ++e) sum += weights[e] = rule.is_valid(e);
  }
  fill_prefix_sums(row, padded, scale_of(row, count, sum), cdf);
  const uint64_t draw = fixed_draw(word, cdf[padded - 1]);
  int64_t passed = 0;
  for (int64_t e = 0; e < padded; ++e) passed += cdf[e] <= draw;
  return passed;
}

template <typename W>
void settle_walkers(const WalkMatrix& m, const WalkRule& rule, const Walkers& walkers,
                    WalkPending& pending) {
  const W* stored = static_cast<const W*>(m.values);
  for (int k = 0; k < pending.count; ++k) {
    const int64_t kernel = pending.kernel[k];
    const int64_t entry =
        draw_kernel_entry(stored + kernel, m.entries, rule, pending.mass[k], pending.word[k]);
    walkers.edge[pending.walker[k]] = kernel + entry;
  }
  pending.count = 0;
}

template <typename W>
void move_walkers(const WalkMatrix& m, const WalkRule& rule, const Walkers& walkers,
                  const WalkScratch& scratch, const void* values, int64_t unit,
                  const uint32_t* order, int64_t count) {
  const W* stored = static_cast<const W*>(m.values);
  const auto* mass = rule.mass ? static_cast<const double*>(values) : nullptr;
  const int64_t candidates = m.candidates(), entries = m.entries;
  const int64_t first_target = m.group_of(unit) * candidates;
  const int64_t first = m.first(unit), stride = m.stride();
  CdfTree cdf(scratch.cdf, candidates);
  if (!fill_unit<W>(m, rule, values, unit, scratch, cdf)) {
    for (int64_t i = 0; i < count; ++i) {
      walkers.next[order[i]] = -1;
      walkers.edge[order[i]] = -1;
    }
    return;
  }
  WalkPending& pending = *scratch.pending;
  Drawn drawn;
  for (int64_t begin = 0; begin < count; begin += kWalkBatch) {
    const int here = batch_of(count, begin);
    draw(cdf, rule, walkers, order + begin, here, drawn);
    if (entries == 1) {
      for (int k = 0; k < here; ++k) {
        walkers.next[order[begin + k]] = first_target + drawn.found[k];
        walkers.edge[order[begin + k]] = first + drawn.found[k] * stride;
      }
      continue;
    }
    for (int k = 0; k < here; ++k) {
      const W* kernel = stored + first + drawn.found[k] * stride;
      __builtin_prefetch(kernel, 0, 2);
      __builtin_prefetch(kernel + entries - 1, 0, 2);
    }
    settle_walkers<W>(m, rule, walkers, pending);
    for (int k = 0; k < here; ++k) {
      pending.walker[k] = order[begin + k];
      pending.kernel[k] = first + drawn.found[k] * stride;
      pending.mass[k] = mass ? mass[drawn.found[k]] : 0.0;
      pending.word[k] = drawn.entry_word[k];
      walkers.next[order[begin + k]] = first_target + drawn.found[k];
    }
    pending.count = here;
  }
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
  CdfTree cdf(scratch.cdf, candidates * entries);
  if (!cdf.fill(Row<double>{scratch.weights})) {
    for (int64_t i = 0; i < count; ++i) {
      walkers.next[order[i]] = walkers.edge[order[i]] = field.next_position[order[i]] = -1;
    }
    return;
  }
  Drawn drawn;
  for (int64_t begin = 0; begin < count; begin += kWalkBatch) {
    const int here = batch_of(count, begin);
    draw(cdf, rule, walkers, order + begin, here, drawn);
    for (int k = 0; k < here; ++k) {
      const int64_t walker = order[begin + k];
      const int64_t candidate = drawn.found[k] / entries, entry = drawn.found[k] % entries;
      walkers.next[walker] = first_target + candidate;
      walkers.edge[walker] = first + candidate * stride + entry;
      field.next_position[walker] = leads_to[entry];
    }
  }
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

void settle(const WalkMatrix& m, const WalkRule& rule, const Walkers& walkers,
            const WalkScratch& scratch) {
  by_stored(m.storage,
            [&](auto kind) { settle_walkers<decltype(kind)>(m, rule, walkers, *scratch.pending); });
}

void field(const WalkMatrix& m, const WalkRule& rule, const WalkField& field,
           const Walkers& walkers, const WalkScratch& scratch, int64_t unit, int64_t position,
           const uint32_t* order, int64_t count) {
  by_stored(m.storage, [&](auto kind) {
    move_in_field<decltype(kind)>(m, rule, field, walkers, scratch, unit, position, order, count);
  });
}

// Sums of 3 x 3 kernels, each in the order of its entries; eight kernels side by side.
template <typename W>
void fill_masses_of_nine(const W* values, int64_t count, double* mass) {
  int64_t i = 0;
#if PP_AVX512
  if constexpr (std::is_same_v<W, float>) {
    constexpr int64_t kFloatsAhead = 2048;  // of the stream: the processor alone looks less far
    for (; i + 8 <= count; i += 8) {
      const float* from = values + 9 * i;
      for (int line = 0; line < 5; ++line)
        __builtin_prefetch(from + kFloatsAhead + 16 * line, 0, 2);
      Vector<double> v[8];
      double ninth[8];
#pragma GCC unroll 8
      for (int k = 0; k < 8; ++k) {
        v[k] = _mm512_abs_pd(_mm512_cvtps_pd(_mm256_loadu_ps(from + 9 * k)));
        ninth[k] = magnitude(static_cast<double>(from[9 * k + 8]));
      }
      transpose<double>(v);
      Vector<double> sum = v[0];
#pragma GCC unroll 8
      for (int e = 1; e < 8; ++e) sum += v[e];
      store_vector<double>(mass + i, sum + load_vector(ninth));
    }
  }
#endif
  for (; i < count; ++i) {
    double sum = 0;
    for (int e = 0; e < 9; ++e) sum += magnitude(static_cast<double>(widen(values[9 * i + e])));
    mass[i] = sum;
  }
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

void mass(const WalkMatrix& m, const WalkRule& rule, int64_t begin, int64_t end, double* mass) {
  by_stored(m.storage, [&](auto kind) {
    const auto* values = static_cast<const decltype(kind)*>(m.values) + begin * m.entries;
    if (m.entries == 9 && rule.power == 1 && !rule.valid) {
      return fill_masses_of_nine(values, end - begin, mass + begin);
    }
    for (int64_t i = begin; i < end; ++i, values += m.entries) {
      mass[i] = candidate_weight(values, m.entries, rule);
    }
  });
}

}  // namespace

WalkKernels walk_kernels() { return {unit, settle, field, mass, transpose}; }

}  // namespace pathprune::PATHPRUNE_ISA
