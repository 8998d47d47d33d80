// Visitors that sum flows (lane_sweep.h says what a visitor is). Each of their strips also takes
// mapped weights, so that another strip can share them.

#pragma once

#include "ops/cpu_kernels.h"
#include "ops/lane_sweep.h"

namespace pathprune::PATHPRUNE_ISA {

// y[t, r] = sum of f(w) x[t, c]: per tile in lanes, tiles in order in double.
template <typename A, int kPositions, typename Map = AnyMap<A>>
class RowFlowVisitor {
 public:
  RowFlowVisitor(const Weights& w, const Block& block, const RowFlow<A>& flow)
      : flow_(flow), map_(flow.f), rows_(w.rows), first_tile_(block.tile_begin) {
    x_block_ = flow.x + block.group * flow.positions * flow.pitch;
    sums_block_ = flow.sums + (block.tile_block * w.groups + block.group) * flow.positions * w.rows;
  }

  PP_INLINE int passes() const { return static_cast<int>(flow_.positions / kPositions); }

  PP_INLINE void enter(const Tile& tile, int pass) {
    x_ = x_block_ + pass * kPositions * flow_.pitch + tile.first_column();
    sums_ = sums_block_ + pass * kPositions * rows_ + tile.row;
    is_first_ = tile.index == first_tile_;
  }

  template <int kRows>
  class Strip {
   public:
    PP_INLINE Strip(RowFlowVisitor& visitor, const Tile&, int first)
        : map_(visitor.map_), visitor_(visitor), x_(visitor.x_), first_(first) {}

    PP_INLINE Mapped<A, kRows> map(const Lanes<A> (&w)[kRows]) const { return map_rows(map_, w); }

    PP_INLINE void operator()(int word, const Lanes<A> (&w)[kRows], const Bits (&live)[kRows]) {
      take(word, map(w), live);
    }

    PP_INLINE void take(int word, const Mapped<A, kRows>& f, const Bits (&live)[kRows]) {
#pragma GCC unroll 4
      for (int p = 0; p < kPositions; ++p) {
        const Lanes<A> x = load(x_ + p * visitor_.flow_.pitch + kWordColumns * word);
#pragma GCC unroll 4
        for (int j = 0; j < kRows; ++j) {
          sum_[p][j] = add_where(live[j], sum_[p][j], f.row[j] * x);
        }
      }
    }

    PP_INLINE void finish() {
      for (int p = 0; p < kPositions; ++p) {
        double* sums = visitor_.sums_ + p * visitor_.rows_ + first_;
#pragma GCC unroll 4
        for (int j = 0; j < kRows; ++j) {
          const double tile_sum = sum(sum_[p][j]);
          sums[j] = visitor_.is_first_ ? tile_sum : sums[j] + tile_sum;
        }
      }
    }

   private:
    const Map map_;
    RowFlowVisitor& visitor_;
    const A* x_;
    int first_;
    Lanes<A> sum_[kPositions][kRows] = {};
  };

 private:
  const RowFlow<A>& flow_;
  const Map map_;
  int64_t rows_, first_tile_;
  const A* x_block_;
  double* sums_block_;
  const A* x_ = nullptr;    // [kPositions, columns], pitch apart
  double* sums_ = nullptr;  // [kPositions, rows]
  bool is_first_ = false;
};

// y[t, c] = sum of f(w) g[t, r], rows in order. The sums of the block must be zero at first.
template <typename A, int kPositions, typename Map = AnyMap<A>>
class ColumnFlowVisitor {
 public:
  ColumnFlowVisitor(const Weights& w, const Block& block, const ColumnFlow<A>& flow)
      : flow_(flow), map_(flow.f), rows_(w.rows) {
    g_block_ = flow.g + block.group * flow.positions * w.rows;
    sums_block_ =
        flow.sums + (block.row_block * w.groups + block.group) * flow.positions * flow.pitch;
  }

  PP_INLINE int passes() const { return static_cast<int>(flow_.positions / kPositions); }

  PP_INLINE void enter(const Tile& tile, int pass) {
    g_ = g_block_ + pass * kPositions * rows_ + tile.row;
    sums_ = sums_block_ + pass * kPositions * flow_.pitch + tile.first_column();
  }

  template <int kRows>
  class Strip {
   public:
    PP_INLINE Strip(ColumnFlowVisitor& visitor, const Tile&, int first)
        : map_(visitor.map_), sums_(visitor.sums_), pitch_(visitor.flow_.pitch) {
#pragma GCC unroll 4
      for (int p = 0; p < kPositions; ++p) {
#pragma GCC unroll 4
        for (int j = 0; j < kRows; ++j) {
          g_[p][j] = broadcast(visitor.g_[p * visitor.rows_ + first + j]);
        }
      }
    }

    PP_INLINE Mapped<A, kRows> map(const Lanes<A> (&w)[kRows]) const { return map_rows(map_, w); }

    PP_INLINE void operator()(int word, const Lanes<A> (&w)[kRows], const Bits (&live)[kRows]) {
      take(word, map(w), live);
    }

    PP_INLINE void take(int word, const Mapped<A, kRows>& f, const Bits (&live)[kRows]) {
#pragma GCC unroll 4
      for (int p = 0; p < kPositions; ++p) add(p, word, weigh(p, f), live);
    }

    PP_INLINE Mapped<A, kRows> weigh(int p, const Mapped<A, kRows>& f) const {
      return weigh_rows(f, g_[p]);
    }

    PP_INLINE void add(int p, int word, const Mapped<A, kRows>& fg, const Bits (&live)[kRows]) {
      A* sums = sums_ + p * pitch_ + kWordColumns * word;
      Lanes<A> sum = load(sums);
#pragma GCC unroll 4
      for (int j = 0; j < kRows; ++j) sum = add_where(live[j], sum, fg.row[j]);
      store(sums, sum);
    }

    PP_INLINE void finish() {}

   private:
    const Map map_;
    A* sums_;
    int64_t pitch_;
    Lanes<A> g_[kPositions][kRows];
  };

 private:
  const ColumnFlow<A>& flow_;
  const Map map_;
  int64_t rows_;
  const A* g_block_;
  A* sums_block_;
  const A* g_ = nullptr;  // [kPositions, rows]
  A* sums_ = nullptr;     // [kPositions, columns], pitch apart
};

}  // namespace pathprune::PATHPRUNE_ISA
