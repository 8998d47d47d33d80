// Products with sparse weights for up to eight positions, compiled for each instruction set. The
// positions of a unit lie side by side in eight lanes, so a panel takes half the cache that whole
// vectors would take, and a broadcast value or eight products go with one operand of it. Rows are
// taken whole: a panel of 4096 columns lies in the second cache, which is read as fast as needed.

#pragma once

#include <algorithm>
#include <vector>

#include "ops/lane_sparse_one.h"

// Eight lanes are more than some instruction sets have in a register. What passes them is inlined,
// so how they would be passed does not matter.
#pragma GCC diagnostic ignored "-Wpsabi"

namespace pathprune::PATHPRUNE_ISA {

inline constexpr int kFew = static_cast<int>(kFewPositions);

template <typename A>
struct EightOf {
  typedef A type __attribute__((vector_size(kFew * sizeof(A))));
};
template <typename A>
using Eight = typename EightOf<A>::type;

template <typename A>
PP_INLINE Eight<A> load_eight(const A* from) {
  Eight<A> v;
  std::memcpy(&v, from, sizeof(v));
  return v;
}

template <typename A>
PP_INLINE Eight<A> fused_eight(const Eight<A>& a, const Eight<A>& b, const Eight<A>& c) {
#if defined(__FMA__)
  if constexpr (sizeof(A) == 4) return _mm256_fmadd_ps(a, b, c);
#endif
#if PP_AVX512
  if constexpr (sizeof(A) == 8) return _mm512_fmadd_pd(a, b, c);
#endif
  return a * b + c;
}

template <typename A>
void pack_few(const Strided<const A>& x, int64_t positions, int64_t units, A* panel) {
  for (int64_t unit = 0; unit < units; ++unit) {
    const A* from = x.data + unit * x.unit;
    for (int64_t t = 0; t < kFew; ++t) {
      panel[unit * kFew + t] = t < positions ? from[t * x.position] : A(0);
    }
  }
}

// to[t * pitch + i] = sums[i][t]
template <typename A>
PP_INLINE void unpack_few(const A* sums, int64_t count, int64_t positions, int64_t pitch, A* to) {
  for (int64_t t = 0; t < positions; ++t) {
    for (int64_t i = 0; i < count; ++i) to[t * pitch + i] = sums[i * kFew + t];
  }
}

template <typename A>
void multiply_few(const Pattern& w, const Rows& rows, const A* values, const A* panel,
                  int64_t positions, A* y) {
  constexpr int kChains = 4;
  alignas(64) A sums[kSparseRows * kFew] = {};
  Entries entries(w, rows, kIndexedColumns, values);
  entries.visit(
      [&](int64_t column, int64_t i, int64_t begin, int64_t end) __attribute__((always_inline)) {
        const A* base = panel + column / kIndexedColumns * kIndexedColumns * kFew;
        Eight<A> chain[kChains] = {};
        const auto add = [&](int64_t k, int n) __attribute__((always_inline)) {
          const Eight<A> value = values[k] - Eight<A>{};
          chain[n] = fused_eight<A>(value, load_eight(base + w.index[k] * kFew), chain[n]);
        };
        int64_t k = begin;
        for (; k + kChains <= end; k += kChains) {
#pragma GCC unroll 4
          for (int n = 0; n < kChains; ++n) add(k + n, n);
        }
        for (; k < end; ++k) add(k, 0);
        const Eight<A> total =
            load_eight(sums + i * kFew) + ((chain[0] + chain[1]) + (chain[2] + chain[3]));
        std::memcpy(sums + i * kFew, &total, sizeof(total));
      });
  unpack_few(sums, rows.end - rows.begin, positions, w.rows, y + rows.begin);
}

// y[t, c] = sum_r g[t, r] w[r, c], row after row, for the columns of words first_word .. last_word:
// tiles of columns whose sums stay in the second cache while all rows pass by.
template <typename A>
void spread_few(const Pattern& w, int64_t group, int64_t first_word, int64_t last_word,
                const A* values, const A* g_panel, int64_t positions, A* y) {
  constexpr int64_t kTileWords = 256, kRowsAhead = 4;
  const int64_t first = group * w.rows;
  std::vector<int64_t> next(w.rows);
  std::vector<Eight<A>> tile(std::min(kTileWords, last_word - first_word) * kLanes);
  for (int64_t row = 0; row < w.rows; ++row) next[row] = entry_of_word(w, first + row, first_word);
  for (int64_t word = first_word; word < last_word; word += kTileWords) {
    const int64_t words = std::min(kTileWords, last_word - word), column = word * kLanes;
    std::fill(tile.begin(), tile.end(), Eight<A>{});
    A* const sums = reinterpret_cast<A*>(tile.data());
    A* const to = sums - column * kFew;
    for (int64_t row = 0; row < w.rows; ++row) {
      const int64_t ahead = next[std::min(row + kRowsAhead, w.rows - 1)];
      __builtin_prefetch(w.index + ahead);
      for (int k = 0; k < 64; k += 64 / sizeof(A)) __builtin_prefetch(values + ahead + k);
      const int64_t begin = next[row];
      const int64_t end =
          begin + sweeping::count_bits(w.layout + (first + row) * w.words + word, words);
      next[row] = end;
      const Eight<A> flow = load_eight(g_panel + row * kFew);
#pragma GCC unroll 4
      for (int64_t k = begin; k < end; ++k) {
        A* const at = to + w.index[k] * kFew;
        const Eight<A> value = values[k] - Eight<A>{};
        const Eight<A> sum = fused_eight<A>(value, flow, load_eight(at));
        std::memcpy(at, &sum, sizeof(sum));
      }
    }
    const int64_t count = std::min(words * kLanes, w.columns - column);
    unpack_few(sums, count, positions, w.columns, y + column);
  }
}

// Lane i of the lower is a[i], of the upper a[i + kApart], where i lacks the bit kApart; else
// b[i - kApart] and b[i].
template <typename A, int kApart>
PP_INLINE Eight<A> sum_of_halves(const Eight<A>& a, const Eight<A>& b) {
  if constexpr (kApart == 4) {
    return __builtin_shufflevector(a, b, 0, 1, 2, 3, 8, 9, 10, 11) +
           __builtin_shufflevector(a, b, 4, 5, 6, 7, 12, 13, 14, 15);
  } else if constexpr (kApart == 2) {
    return __builtin_shufflevector(a, b, 0, 1, 8, 9, 4, 5, 12, 13) +
           __builtin_shufflevector(a, b, 2, 3, 10, 11, 6, 7, 14, 15);
  } else {
    return __builtin_shufflevector(a, b, 0, 8, 2, 10, 4, 12, 6, 14) +
           __builtin_shufflevector(a, b, 1, 9, 3, 11, 5, 13, 7, 15);
  }
}

template <typename A>
void sample_few(const Pattern& w, const Rows& rows, const A* x_panel, const A* g_panel, A* sums) {
  Entries entries(w, rows, kIndexedColumns);
  entries.visit(
      [&](int64_t column, int64_t i, int64_t begin, int64_t end) __attribute__((always_inline)) {
        const A* base = x_panel + column / kIndexedColumns * kIndexedColumns * kFew;
        const Eight<A> flow = load_eight(g_panel + (rows.begin + i) * kFew);
        for (int64_t k = begin; k < end; k += kFew) {
          const int64_t count = end - k;
          Eight<A> made[kFew];
#pragma GCC unroll 8
          for (int j = 0; j < kFew; ++j) {
            // Behind the last entry it is taken again: no branch, and nothing else to be read.
            made[j] = flow * load_eight(base + w.index[j < count ? k + j : end - 1] * kFew);
          }
#pragma GCC unroll 4
          for (int j = 0; j < 4; ++j) made[j] = sum_of_halves<A, 4>(made[j], made[j + 4]);
#pragma GCC unroll 2
          for (int j = 0; j < 2; ++j) made[j] = sum_of_halves<A, 2>(made[j], made[j + 2]);
          made[0] = sum_of_halves<A, 1>(made[0], made[1]);
          std::memcpy(sums + k, &made[0], std::min<int64_t>(count, kFew) * sizeof(A));
        }
      });
}

}  // namespace pathprune::PATHPRUNE_ISA
