// Products with sparse weights, compiled for each instruction set.
//
// Positions lie in the lanes: an entry costs one broadcast and, per vector of positions, one
// multiply-add with an operand from the panel. Columns are taken tile by tile, so that the part of
// the panel that a tile needs stays in the cache while all rows of the block pass by.

#include "ops/lane_shuffle.h"
#include "ops/lane_sparse_few.h"
#include "ops/lane_sweep.h"
#include "ops/sparse.h"

namespace pathprune::PATHPRUNE_ISA {
namespace {

// Sums of a row stay in registers: of twelve vectors besides what is loaded, up to eight positions'
// worth of sixteen.
template <typename A>
constexpr int kMostVectors = std::clamp(12 / Lanes<A>::kParts, 1, 8);

constexpr int64_t whole_lanes(int64_t count) { return (count + kLanes - 1) / kLanes * kLanes; }

// Calls function<kVectors>() for the number of vectors.
template <int kMost, typename Function>
PP_INLINE void by_vectors(int vectors, const Function& function) {
  if constexpr (kMost > 1) {
    if (vectors < kMost) return by_vectors<kMost - 1>(vectors, function);
  }
  function.template operator()<kMost>();
}

// ---- values and panels --------------------------------------------------------------------------

template <typename A>
void map(const Weights& w, WeightMap f, int64_t begin, int64_t end, A* mapped) {
  const AnyMap<A> map(f);
  const A* values = mapped;
  if (w.storage == Storage::kFloat32 || w.storage == Storage::kFloat64) {
    values = static_cast<const A*>(w.values);
  } else if constexpr (sizeof(A) == sizeof(float)) {
    widen_values(w, begin, end - begin, mapped + begin);
  }
  int64_t i = begin;
  for (; i + kLanes <= end; i += kLanes) store(mapped + i, map(load(values + i)));
  if (i < end) {
    A rest[kLanes];
    store(rest, map(load_first(values + i, end - i)));
    std::memcpy(mapped + i, rest, (end - i) * sizeof(A));
  }
}

template <typename A>
void pack(const Strided<const A>& x, int64_t positions, int64_t begin, int64_t end, int vectors,
          A* panel) {
  constexpr int kW = kWidth<A>;
  const int64_t lanes = vectors * kLanes;
  if (x.unit != 1) {
    for (int64_t unit = begin; unit < end; ++unit) {
      A* to = panel + unit * lanes;
      const A* from = x.data + unit * x.unit;
      if (x.position == 1) {
        std::memcpy(to, from, positions * sizeof(A));
      } else {
        for (int64_t t = 0; t < positions; ++t) to[t] = from[t * x.position];
      }
      std::memset(to + positions, 0, (lanes - positions) * sizeof(A));
    }
    return;
  }
  for (int64_t t = 0; t < lanes; t += kW) {
    for (int64_t unit = begin; unit < end; unit += kW) {
      Vector<A> block[kW];
#pragma GCC unroll 16
      for (int i = 0; i < kW; ++i) {
        const A* from = x.data + (t + i) * x.position + unit;
        block[i] = t + i < positions ? load_vector(from, end - unit) : Vector<A>{};
      }
      transpose<A>(block);
#pragma GCC unroll 16
      for (int i = 0; i < kW; ++i) {
        if (unit + i < end) store_vector(panel + (unit + i) * lanes + t, block[i]);
      }
    }
  }
}

// Writes sums [rows, lanes] to y.
template <typename A>
void unpack(const A* sums, int64_t lanes, const Rows& rows, int64_t positions,
            const Strided<A>& y) {
  constexpr int kW = kWidth<A>;
  const int64_t count = rows.end - rows.begin;
  if (y.unit != 1) {
    for (int64_t i = 0; i < count; ++i) {
      A* to = y.data + (rows.begin + i) * y.unit;
      for (int64_t t = 0; t < positions; ++t) to[t * y.position] = sums[i * lanes + t];
    }
    return;
  }
  for (int64_t i = 0; i < count; i += kW) {
    for (int64_t t = 0; t < positions; t += kW) {
      Vector<A> block[kW];
#pragma GCC unroll 16
      for (int j = 0; j < kW; ++j) block[j] = load_vector(sums + (i + j) * lanes + t);
      transpose<A>(block);
#pragma GCC unroll 16
      for (int j = 0; j < kW; ++j) {
        if (t + j >= positions) continue;
        store_vector(y.data + (t + j) * y.position + rows.begin + i, block[j], count - i);
      }
    }
  }
}

// ---- y = x w^T ----------------------------------------------------------------------------------

// Adds to sum[kVectors * 16] those of one row's entries. Entries are summed in several chains where
// the vectors alone would leave the arithmetic waiting for itself.
template <typename A, int kVectors, bool kOrdered>
PP_INLINE void add_entries(const Pattern& w, const A* values, const A* panel, int64_t begin,
                           int64_t end, A* sum) {
  constexpr int kParts = kVectors * Lanes<A>::kParts;
  constexpr int kChains = kParts >= 4 ? 1 : kParts >= 2 ? 2 : 4;
  Vector<A> sums[kChains][kParts] = {};
  const auto add = [&](int64_t i, int chain) __attribute__((always_inline)) {
    const Vector<A> value = values[kOrdered ? w.order[i] : i] - Vector<A>{};
    const A* x = panel + w.index[i] * int64_t{kVectors * kLanes};
#pragma GCC unroll 16
    for (int p = 0; p < kParts; ++p) {
      sums[chain][p] = fused<A>(value, load_vector(x + p * kWidth<A>), sums[chain][p]);
    }
  };
  int64_t i = begin;
  for (; i + kChains <= end; i += kChains) {
#pragma GCC unroll 4
    for (int chain = 0; chain < kChains; ++chain) add(i + chain, chain);
  }
  for (; i < end; ++i) add(i, 0);
#pragma GCC unroll 16
  for (int p = 0; p < kParts; ++p) {
    Vector<A> total = load_vector(sum + p * kWidth<A>);
#pragma GCC unroll 4
    for (int chain = 0; chain < kChains; ++chain) total += sums[chain][p];
    store_vector(sum + p * kWidth<A>, total);
  }
}

template <typename A, int kVectors, bool kOrdered>
void multiply_by(const Pattern& w, const Rows& rows, const A* values, const A* panel,
                 int64_t positions, const Strided<A>& y) {
  constexpr int64_t kPitch = kVectors * kLanes;
  alignas(64) A sums[kSparseRows * kPitch];
  std::memset(sums, 0, whole_lanes(rows.end - rows.begin) * kPitch * sizeof(A));
  Entries entries(w, rows, tile_columns(w, rows, kPitch * sizeof(A), std::max(12, 48 / kVectors)),
                  values);
  entries.visit(
      [&](int64_t column, int64_t i, int64_t begin, int64_t end) __attribute__((always_inline)) {
        if (begin == end) return;
        const A* base = panel + column / kIndexedColumns * kIndexedColumns * kPitch;
        add_entries<A, kVectors, kOrdered>(w, values, base, begin, end, sums + i * kPitch);
      });
  unpack(sums, kPitch, rows, positions, y);
}

template <typename A>
void multiply(const Pattern& w, const Rows& rows, const A* values, const A* panel, int vectors,
              int64_t positions, const Strided<A>& y) {
  by_vectors<kMostVectors<A>>(vectors, [&]<int kVectors>() {
    if (w.order) {
      multiply_by<A, kVectors, true>(w, rows, values, panel, positions, y);
    } else {
      multiply_by<A, kVectors, false>(w, rows, values, panel, positions, y);
    }
  });
}

// ---- x^T g at the entries -----------------------------------------------------------------------

template <typename A, int kVectors>
PP_INLINE void sample_row(const Pattern& w, const A* panel, const A* g, int64_t begin, int64_t end,
                          bool add, A* sums) {
  constexpr int kParts = kVectors * Lanes<A>::kParts, kW = kWidth<A>;
  Vector<A> flow[kParts];
#pragma GCC unroll 16
  for (int p = 0; p < kParts; ++p) flow[p] = load_vector(g + p * kW);
  for (int64_t i = begin; i < end; i += kW) {
    const int64_t count = end - i;
    const Vector<A> made = sum_crosswise<A>([&](int j) __attribute__((always_inline)) {
      // Behind the last entry it is taken again: no branch, and nothing else to be read.
      const A* x = panel + w.index[j < count ? i + j : end - 1] * int64_t{kVectors * kLanes};
      Vector<A> product = flow[0] * load_vector(x);
#pragma GCC unroll 16
      for (int p = 1; p < kParts; ++p) {
        product = fused<A>(flow[p], load_vector(x + p * kW), product);
      }
      return product;
    });
    store_vector(sums + i, add ? made + load_vector(sums + i, count) : made, count);
  }
}

template <typename A>
void sample(const Pattern& w, const Rows& rows, const A* x_panel, const A* g_panel, int vectors,
            bool add, A* sums) {
  by_vectors<kMostVectors<A>>(vectors, [&]<int kVectors>() {
    constexpr int64_t kPitch = kVectors * kLanes;
    Entries entries(w, rows, tile_columns(w, rows, kPitch * sizeof(A), 64));
    entries.visit([&](int64_t column, int64_t i, int64_t begin,
                      int64_t end) __attribute__((always_inline)) {
      const A* base = x_panel + column / kIndexedColumns * kIndexedColumns * kPitch;
      sample_row<A, kVectors>(w, base, g_panel + (rows.begin + i) * kPitch, begin, end, add, sums);
    });
  });
}

// ---- written out --------------------------------------------------------------------------------

template <typename T>
void scatter_values(const Pattern& w, const Rows& rows, const T* values, T* dense) {
  dense += w.flat_row(rows) * w.columns;
  std::memset(dense, 0, (rows.end - rows.begin) * w.columns * sizeof(T));
  Entries entries(w, rows, kIndexedColumns);
  entries.visit([&](int64_t column, int64_t i, int64_t begin, int64_t end)
                    __attribute__((always_inline)) {
                      T* row = dense + i * w.columns + column;
                      for (int64_t k = begin; k < end; ++k) row[w.index[k]] = values[k];
                    });
}

void scatter(const Pattern& w, const Rows& rows, int64_t size, const void* values, void* dense) {
  if (w.columns == 0) return;
  if (size == 8) {
    scatter_values(w, rows, static_cast<const uint64_t*>(values), static_cast<uint64_t*>(dense));
  } else if (size == 4) {
    scatter_values(w, rows, static_cast<const uint32_t*>(values), static_cast<uint32_t*>(dense));
  } else {
    scatter_values(w, rows, static_cast<const uint16_t*>(values), static_cast<uint16_t*>(dense));
  }
}

// Without an instruction that expands there are no such shares.
constexpr double kExpandFrom = PP_AVX512 ? 0.15 : 2, kUpdateFrom = PP_AVX512 ? 0.25 : 2;

}  // namespace

template <typename A>
SparseKernels<A> sparse_kernels() {
  return {kMostVectors<A>, map<A>,        pack<A>,       multiply<A>, gather<A>, expand_rows<A>,
          spread<A>,       kExpandFrom,   kUpdateFrom,   sample<A>,   outer<A>,  pack_few<A>,
          multiply_few<A>, spread_few<A>, sample_few<A>, scatter};
}
template SparseKernels<float> sparse_kernels<float>();
template SparseKernels<double> sparse_kernels<double>();

}  // namespace pathprune::PATHPRUNE_ISA
