// Products with a weight of which few entries are stored, and what their CPU kernels take.
//
// A pattern says which entries of a matrix are stored: as mask bits (`layout`), and as the columns
// of the entries one after another (`index`). Its transpose is a pattern too, whose entries find
// their values by `order`; so one kernel computes both products.

#pragma once

#include <cstdint>

#include "core/isa.h"
#include "core/weight_map.h"
#include "ops/weights.h"

namespace pathprune {

// Some rows of one group.
struct Rows {
  int64_t group, begin, end;
};

struct Pattern {
  const uint16_t* layout;    // [groups, rows, words]
  const int64_t* row_start;  // [groups * rows + 1]: where the entries of each row begin
  const uint16_t* index;     // [stored]: columns, modulo 2^16
  const int32_t* order;      // [stored]: which value an entry has; null: entry i has value i
  int64_t groups, rows, columns, words;

  PP_HD int64_t flat_row(const Rows& some) const { return some.group * rows + some.begin; }
};

inline constexpr int64_t kIndexedColumns = 1 << 16;

// A flow [positions, units] of one group.
template <typename A>
struct Strided {
  A* data;
  int64_t position, unit;  // strides
};

// What one call of a kernel takes at most: its sums lie on the stack.
inline constexpr int64_t kSparseRows = 256;

// Up to so many positions share a vector of eight lanes.
inline constexpr int64_t kFewPositions = 8;

// A panel is a part of a flow with positions side by side, [units, 16 * vectors], zero behind the
// last position. A flow is cut into panels that lie one behind the other.
template <typename A>
struct SparseKernels {
  int most_vectors;  // of a panel
  // mapped[i] = f(value i) for begin <= i < end.
  void (*map)(const Weights& w, WeightMap f, int64_t begin, int64_t end, A* mapped);
  // Makes units begin .. end - 1 of a panel of `positions` positions.
  void (*pack)(const Strided<const A>& x, int64_t positions, int64_t begin, int64_t end,
               int vectors, A* panel);
  // y[t, r] = sum_c w[r, c] x[t, c] for the rows and the positions of a panel.
  void (*multiply)(const Pattern& w, const Rows& rows, const A* values, const A* panel, int vectors,
                   int64_t positions, const Strided<A>& y);
  // The same for one position: by the columns of the entries, or by the mask bits.
  void (*gather)(const Pattern& w, const Rows& rows, const A* values, const A* x, A* y);
  void (*expand)(const Pattern& w, const Rows& rows, const A* values, const A* x, A* y);
  // The transposed product for one position, words first_word .. last_word - 1 of y [columns],
  // padded to whole words: y[c] = sum_r g[r] w[r, c]. At most 2^16 columns; no `order`.
  void (*spread)(const Pattern& w, int64_t group, int64_t first_word, int64_t last_word,
                 bool by_bits, const A* values, const A* g, A* y);
  // Shares of live entries from which on the mask bits are faster than the columns: for `expand`,
  // and for `spread` and `outer`, which also write.
  double expand_from, update_from;
  // sums[i] (+)= sum_t g[t, r] x[t, c] over the positions of a panel, for the entries i of the
  // rows.
  void (*sample)(const Pattern& w, const Rows& rows, const A* x_panel, const A* g_panel,
                 int vectors, bool add, A* sums);
  // The same for one position: products[i] = g[r] x[c], x padded to whole words, at most 2^16
  // columns.
  void (*outer)(const Pattern& w, const Rows& rows, bool by_bits, const A* x, const A* g,
                A* products);
  // The same for up to kFewPositions, by panels [units, 8] that pack_few makes; y points at what a
  // group has, [positions, rows] or [positions, columns]. At most 2^16 columns for spread_few.
  void (*pack_few)(const Strided<const A>& x, int64_t positions, int64_t units, A* panel);
  void (*multiply_few)(const Pattern& w, const Rows& rows, const A* values, const A* panel,
                       int64_t positions, A* y);
  void (*spread_few)(const Pattern& w, int64_t group, int64_t first_word, int64_t last_word,
                     const A* values, const A* g_panel, int64_t positions, A* y);
  void (*sample_few)(const Pattern& w, const Rows& rows, const A* x_panel, const A* g_panel,
                     A* sums);
  // Writes the rows out, with zeros where nothing is stored; `size` bytes a value.
  void (*scatter)(const Pattern& w, const Rows& rows, int64_t size, const void* values,
                  void* dense);
};

PP_IN_EVERY_ISA(template <typename A> SparseKernels<A> sparse_kernels();)

}  // namespace pathprune
