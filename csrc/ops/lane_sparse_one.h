// Products with sparse weights for one position, compiled for each instruction set: y = x w^T, its
// transpose y = g w, and their product g x at the entries; by the columns of the entries where
// there are few, by the mask bits where there are many.

#pragma once

#include <algorithm>
#include <vector>

#include "ops/lane_shuffle.h"
#include "ops/lane_sweep.h"
#include "ops/sparse.h"

namespace pathprune::PATHPRUNE_ISA {

// Of a panel, per tile: what the second cache holds beside the entries.
constexpr int64_t kTileBytes = 256 << 10;
// So much of a panel lies in the first cache; entries of a row in a tile that are too few, for the
// branches that end them are not foreseen, are worth a tile of the second.
constexpr int64_t kSmallTileBytes = 32 << 10;

// Columns of a tile where one takes so many bytes of a panel: a power of two, so that in no tile an
// index modulo 2^16 wraps.
PP_INLINE int64_t tile_columns(const Pattern& w, const Rows& rows, int64_t column_bytes,
                               int64_t least_entries) {
  const int64_t first = w.flat_row(rows), count = rows.end - rows.begin;
  const int64_t entries = w.row_start[first + count] - w.row_start[first];
  int64_t columns = 64;
  while (columns < kIndexedColumns) {
    const int64_t bytes = 2 * columns * column_bytes;
    const bool is_short = entries * columns < least_entries * count * w.columns;
    if (bytes > (is_short ? kTileBytes : kSmallTileBytes)) break;
    columns *= 2;
  }
  return columns;
}

// a * b + c
template <typename A>
PP_INLINE A fused_one(A a, A b, A c) {
#if defined(__FMA__)
  return sizeof(A) == 4 ? A(__builtin_fmaf(a, b, c)) : A(__builtin_fma(a, b, c));
#else
  return a * b + c;
#endif
}

// The entries of some rows of a pattern, tile after tile.
class Entries {
 public:
  Entries(const Pattern& w, const Rows& rows, int64_t tile_columns, const void* values = nullptr)
      : w_(w),
        values_(values),
        first_(w.flat_row(rows)),
        count_(rows.end - rows.begin),
        columns_(tile_columns) {
    for (int64_t i = 0; i < count_; ++i) next_[i] = w.row_start[first_ + i];
  }

  // Calls visit(tile's first column, row of the block, entries begin .. end - 1).
  template <typename Visit>
  PP_INLINE void visit(const Visit& visit) {
    for (int64_t column = 0; column < w_.columns; column += columns_) {
      const bool is_last = column + columns_ >= w_.columns;
      const int64_t words = columns_ / kLanes;
      const uint16_t* layout = w_.layout + first_ * w_.words + column / kLanes;
      for (int64_t i = 0; i < count_; ++i, layout += w_.words) {
        const int64_t begin = next_[i];
        const int64_t end =
            is_last ? w_.row_start[first_ + i + 1] : begin + sweeping::count_bits(layout, words);
        next_[i] = end;
        if (values_) prefetch(i);
        visit(column, i, begin, end);
      }
    }
  }

 private:
  static constexpr int64_t kRowsAhead = 4, kValuesAhead = 24;

  // The entries of a row in a tile are too few for the processor to foresee the next, and values in
  // another order lie anywhere.
  PP_INLINE void prefetch(int64_t i) const {
    const int64_t entry = next_[std::min(i + kRowsAhead, count_ - 1)];
    __builtin_prefetch(w_.index + entry);
    __builtin_prefetch(w_.index + entry + 32);
    const auto* words = static_cast<const int32_t*>(w_.order ? w_.order : values_);
    for (int k = 0; k < 64; k += 16) __builtin_prefetch(words + entry + k);
    if (!w_.order) return;
    const int64_t begin = next_[std::min(i + 1, count_ - 1)];
    const int64_t end = std::min(begin + kValuesAhead, w_.row_start[w_.groups * w_.rows]);
    for (int64_t k = begin; k < end; ++k) {
      __builtin_prefetch(static_cast<const int32_t*>(values_) + w_.order[k]);
    }
  }

  const Pattern& w_;
  const void* values_;
  const int64_t first_, count_, columns_;
  int64_t next_[kSparseRows];
};

// ---- y = x w^T ----------------------------------------------------------------------------------

#if PP_AVX512
template <bool kOrdered>
PP_INLINE float gather_row(const Pattern& w, const float* values, const float* x, int64_t begin,
                           int64_t end) {
  __m512 sums[2] = {};
  const auto add = [&](int64_t i, __mmask16 live, int k) __attribute__((always_inline)) {
    const __m512 none = _mm512_setzero_ps();
    const __m512i at = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(live, w.index + i));
    __m512 value;
    if constexpr (kOrdered) {
      const __m512i order = _mm512_maskz_loadu_epi32(live, w.order + i);
      value = _mm512_mask_i32gather_ps(none, live, order, values, 4);
    } else {
      value = _mm512_maskz_loadu_ps(live, values + i);
    }
    sums[k] = _mm512_fmadd_ps(value, _mm512_mask_i32gather_ps(none, live, at, x, 4), sums[k]);
  };
  int64_t i = begin;
  for (; i + 32 <= end; i += 32) {
    add(i, 0xFFFF, 0);
    add(i + 16, 0xFFFF, 1);
  }
  for (; i < end; i += 16) add(i, static_cast<__mmask16>(first_lanes(end - i)), 0);
  Lanes<float> total;
  total.part[0] = sums[0] + sums[1];
  return sum(total);
}
#endif

template <bool kOrdered, typename A>
PP_INLINE A gather_row(const Pattern& w, const A* values, const A* x, int64_t begin, int64_t end) {
  constexpr int kChains = 8;
  A sums[kChains] = {};
  int64_t i = begin;
  for (; i + kChains <= end; i += kChains) {
#pragma GCC unroll 8
    for (int k = 0; k < kChains; ++k) {
      sums[k] = fused_one(values[kOrdered ? w.order[i + k] : i + k], x[w.index[i + k]], sums[k]);
    }
  }
  for (int k = 0; i < end; ++i, ++k) {
    sums[k] = fused_one(values[kOrdered ? w.order[i] : i], x[w.index[i]], sums[k]);
  }
  fold<kChains / 2>(sums);
  return sums[0];
}

template <typename A>
void gather(const Pattern& w, const Rows& rows, const A* values, const A* x, A* y) {
  std::fill(y + rows.begin, y + rows.end, A(0));
  Entries entries(w, rows, kIndexedColumns);
  entries.visit(
      [&](int64_t column, int64_t i, int64_t begin, int64_t end) __attribute__((always_inline)) {
        y[rows.begin + i] += w.order ? gather_row<true>(w, values, x + column, begin, end)
                                     : gather_row<false>(w, values, x + column, begin, end);
      });
}

constexpr int kFloatsAhead = 1024;

// What lies at the bits of a word: the values from `value` on, which it moves past them.
template <typename A>
PP_INLINE Lanes<A> expand_next(uint16_t bits, const A*& value) {
  const Lanes<A> wide = expand(Bits{bits}, value);
  __builtin_prefetch(value + kFloatsAhead);
  value += __builtin_popcount(bits);
  return wide;
}

template <typename A>
PP_INLINE void add_product(Lanes<A>& sum, const Lanes<A>& a, const Lanes<A>& b) {
  for (int p = 0; p < Lanes<A>::kParts; ++p) {
    sum.part[p] = fused<A>(a.part[p], b.part[p], sum.part[p]);
  }
}

// x is padded to whole words. The last values are not read by the vector, for nothing may lie
// behind them. A row at a time: its values are one stream, whose lines serve several words.
template <typename A>
void expand_rows(const Pattern& w, const Rows& rows, const A* values, const A* x, A* y) {
  const int64_t first = w.flat_row(rows), stored = w.row_start[w.groups * w.rows];
  for (int64_t i = 0; i < rows.end - rows.begin; ++i) {
    const int64_t begin = w.row_start[first + i], end = w.row_start[first + i + 1];
    if (w.order || end + kLanes > stored) {
      gather(w, Rows{rows.group, rows.begin + i, rows.begin + i + 1}, values, x, y);
      continue;
    }
    constexpr int kChains = 4;
    Lanes<A> sums[kChains] = {};
    const A* value = values + begin;
    const uint16_t* layout = w.layout + (first + i) * w.words;
    int64_t word = 0;
    for (; word + kChains <= w.words; word += kChains) {
#pragma GCC unroll 4
      for (int chain = 0; chain < kChains; ++chain) {
        const Lanes<A> flow = load(x + (word + chain) * kLanes);
        add_product(sums[chain], expand_next(layout[word + chain], value), flow);
      }
    }
    for (; word < w.words; ++word) {
      add_product(sums[0], expand_next(layout[word], value), load(x + word * kLanes));
    }
    y[rows.begin + i] = sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
  }
}

// ---- y = g w, some words of its columns ---------------------------------------------------------

// Where the entries of a row begin that lie in word `first_word` or after it.
PP_INLINE int64_t entry_of_word(const Pattern& w, int64_t flat_row, int64_t first_word) {
  return w.row_start[flat_row] + sweeping::count_bits(w.layout + flat_row * w.words, first_word);
}

// Adds one row.
template <typename A>
PP_INLINE void spread_row(const Pattern& w, int64_t flat_row, int64_t first_word, int64_t last_word,
                          const A* values, A g, A* y) {
  const int64_t begin = entry_of_word(w, flat_row, first_word);
  const int64_t end =
      last_word == w.words ? w.row_start[flat_row + 1] : entry_of_word(w, flat_row, last_word);
  A* const to = y - first_word * kLanes;
  const uint16_t* const column = w.index;
#pragma GCC unroll 4
  for (int64_t i = begin; i < end; ++i) to[column[i]] = fused_one(values[i], g, to[column[i]]);
}

// y[c] = sum_r g[r] w[r, c], row after row, for the columns of words first_word .. last_word - 1.
template <typename A>
void spread(const Pattern& w, int64_t group, int64_t first_word, int64_t last_word, bool by_bits,
            const A* values, const A* g, A* y) {
  const int64_t first = group * w.rows, stored = w.row_start[w.groups * w.rows];
  std::fill(y, y + (last_word - first_word) * kLanes, A(0));
  constexpr int kRowsAtOnce = 4;  // for which y is read and written once
  int64_t row = 0;
  for (; by_bits && row + kRowsAtOnce <= w.rows; row += kRowsAtOnce) {
    if (w.row_start[first + row + kRowsAtOnce] + kLanes > stored) break;
    const A* value[kRowsAtOnce];
    Lanes<A> flow[kRowsAtOnce];
    for (int r = 0; r < kRowsAtOnce; ++r) {
      value[r] = values + entry_of_word(w, first + row + r, first_word);
      flow[r] = broadcast(g[row + r]);
    }
    const uint16_t* layout = w.layout + (first + row) * w.words;
    for (int64_t word = first_word; word < last_word; ++word) {
      A* const to = y + (word - first_word) * kLanes;
      Lanes<A> sums = load(to);
#pragma GCC unroll 4
      for (int r = 0; r < kRowsAtOnce; ++r) {
        add_product(sums, expand_next(layout[r * w.words + word], value[r]), flow[r]);
      }
      store(to, sums);
    }
  }
  for (; row < w.rows; ++row) {
    spread_row(w, first + row, first_word, last_word, values, g[row], y);
  }
}

// ---- g x at the entries -------------------------------------------------------------------------

// x is padded to whole words.
template <typename A>
void outer(const Pattern& w, const Rows& rows, bool by_bits, const A* x, const A* g, A* products) {
  const int64_t first = w.flat_row(rows);
  for (int64_t i = 0; i < rows.end - rows.begin; ++i) {
    const int64_t begin = w.row_start[first + i], end = w.row_start[first + i + 1];
    const A flow = g[rows.begin + i];
    int64_t k = begin;
    if (by_bits) {
      const uint16_t* layout = w.layout + (first + i) * w.words;
      const Lanes<A> wide = broadcast(flow);
      int64_t word = 0;
      for (; word < w.words && k + 2 * kLanes <= end;
           ++word) {  // `append` writes past what it adds
        Lanes<A> product = load(x + word * kLanes);
        for (int p = 0; p < Lanes<A>::kParts; ++p) product.part[p] *= wide.part[p];
        append(products + k, Bits{layout[word]}, product);
        k += __builtin_popcount(layout[word]);
      }
    }
    const uint16_t* const column = w.index;
    A* const __restrict to = products;
#pragma GCC unroll 8
    for (; k < end; ++k) to[k] = flow * x[column[k]];
  }
}

}  // namespace pathprune::PATHPRUNE_ISA
