// Visitors that compute scores (lane_sweep.h says what a visitor is). Their strips also take mapped
// weights, and these times the flow at the rows, so that they can share them with a flow's strip.

#pragma once

#include <algorithm>
#include <limits>

#include "ops/cpu_kernels.h"
#include "ops/lane_sweep.h"

namespace pathprune::PATHPRUNE_ISA {

// The score as `through_flow` makes it, (s(w) g) x, also where it is s(w), with x = g = 1, or s(w)
// times a sum over positions, which is then formed for the tile beforehand, with g = 1: products
// with 1 are exact.
template <typename A, typename Map = AnyMap<A>>
class Scorer {
 public:
  PP_INLINE Scorer(const Weights& w, const Block& block, const ScoreFlows<A>& flows)
      : map_(flows.s), flows_(flows), rows_(w.rows) {
    x_block_ = flows.x + block.group * flows.positions * flows.pitch;
    g_block_ = flows.g + block.group * flows.positions * rows_;
    x_ = pairs_[0];
    x_pitch_ = flows.has_flows && flows.positions != 1 ? kTileColumns : 0;
    std::fill_n(g_, kRowsAtOnce, A(1));
    if (!flows.has_flows) std::fill_n(pairs_[0], kTileColumns, A(1));
  }

  PP_INLINE void enter(const Tile& tile) {
    if (!flows_.has_flows) return;
    if (flows_.positions == 1) {
      x_ = x_block_ + tile.first_column();
      for (int j = 0; j < tile.rows; ++j) g_[j] = g_block_[tile.row + j];
    } else if (tile.rows == 1) {
      pair<1>(tile);
    } else {
      pair<kRowsAtOnce>(tile);
    }
  }

  // The scores of kRows rows of the tile.
  template <int kRows>
  class Strip {
   public:
    PP_INLINE Strip(const Scorer& scorer, int first)
        : map_(scorer.map_), x_(scorer.x_ + first * scorer.x_pitch_), x_pitch_(scorer.x_pitch_) {
#pragma GCC unroll 4
      for (int j = 0; j < kRows; ++j) g_[j] = broadcast(scorer.g_[first + j]);
    }

    PP_INLINE Mapped<A, kRows> map(const Lanes<A> (&w)[kRows]) const { return map_rows(map_, w); }
    PP_INLINE Mapped<A, kRows> weigh(const Mapped<A, kRows>& s) const { return weigh_rows(s, g_); }

    PP_INLINE Lanes<A> operator()(int word, int j, const Lanes<A>& sg) const {
      return sg * load(x_ + j * x_pitch_ + kWordColumns * word);
    }

   private:
    const Map map_;
    const A* x_;
    int64_t x_pitch_;
    Lanes<A> g_[kRows];
  };

 private:
  // The sums over positions, for the columns of live words. Of fewer rows the last is repeated.
  template <int kRows>
  void pair(const Tile& tile) {
    uint64_t todo = 0;
    for (int j = 0; j < tile.rows; ++j) todo |= nonzero_words(tile.mask_row(j), tile.words);
    const A* g[kRows];
    for (int j = 0; j < kRows; ++j) g[j] = g_block_ + tile.row + std::min(j, tile.rows - 1);
    for (; todo; todo &= todo - 1) {
      const int column = kWordColumns * __builtin_ctzll(todo);
      const A* x = x_block_ + tile.first_column() + column;
      Lanes<A> total[kRows] = {};
      for (int64_t t = 0; t < flows_.positions; ++t) {
        const Lanes<A> x_t = load(x + t * flows_.pitch);
#pragma GCC unroll 4
        for (int j = 0; j < kRows; ++j)
          total[j] = add_pair(total[j], x_t, broadcast(g[j][t * rows_]));
      }
#pragma GCC unroll 4
      for (int j = 0; j < kRows; ++j) store(pairs_[j] + column, total[j]);
    }
  }

  const Map map_;
  const ScoreFlows<A>& flows_;
  int64_t rows_;
  const A *x_block_, *g_block_;
  const A* x_;  // [rows of the tile, columns], x_pitch apart
  int64_t x_pitch_;
  A g_[kRowsAtOnce];
  A pairs_[kRowsAtOnce][kTileColumns];
};

// Counts the live scores, and sets those inside a bracket aside.
template <typename A, typename Map = AnyMap<A>>
class CollectVisitor {
 public:
  CollectVisitor(const Weights& w, const Block& block, const ScoreFlows<A>& flows,
                 const Collection<A>& collection)
      : scorer_(w, block, flows), collection_(collection) {}

  PP_INLINE int passes() const { return 1; }

  PP_INLINE void enter(const Tile& tile, int) {
    if (end_ - kept_ > kFlushFrom) flush();
    scorer_.enter(tile);
    for (int j = 0; j < tile.rows; ++j) {
      counts_.live +=
          tile.mask_pitch ? sweeping::count_bits(tile.mask_row(j), tile.words) : tile.columns();
    }
  }

  // To be called once, at the end.
  CollectCounts counts() {
    flush();
    return counts_;
  }

  template <int kRows>
  class Strip {
   public:
    PP_INLINE Strip(CollectVisitor& visitor, const Tile&, int first)
        : visitor_(visitor),
          score_(visitor.scorer_, first),
          lo_(broadcast(visitor.collection_.bracket.lo)),
          hi_(broadcast(visitor.collection_.bracket.hi)),
          end_(visitor.end_) {}

    PP_INLINE Mapped<A, kRows> weigh(const Lanes<A> (&w)[kRows]) const {
      return score_.weigh(score_.map(w));
    }

    PP_INLINE void operator()(int word, const Lanes<A> (&w)[kRows], const Bits (&live)[kRows]) {
      take(word, weigh(w), live);
    }

    // In single rows few lanes are live: their scores are moved together before they are looked at.
    PP_INLINE void take(int word, const Mapped<A, kRows>& sg, const Bits (&live)[kRows]) {
#pragma GCC unroll 4
      for (int j = 0; j < kRows; ++j) {
        const Lanes<A> v = score_(word, j, sg.row[j]);
        if constexpr (kRows == 1) {
          gathered_ = append(gathered_, live[j], v);
        } else {
          look_at(live[j], v);
        }
      }
    }

    PP_INLINE void finish() {
      for (const A* v = visitor_.gathered_; v < gathered_; v += kLanes) {
        look_at(first_lanes(gathered_ - v), load(v));
      }
      visitor_.counts_.above += above_.total();
      visitor_.counts_.not_finite += not_finite_.total();
      visitor_.end_ = end_;
    }

   private:
    PP_INLINE void look_at(Bits live, const Lanes<A>& v) {
      const Bits above = more_than(live, v, hi_);
      above_.add(above);
      not_finite_.add(not_finite(live, v));
      end_ = append(end_, at_least(live, v, lo_) & ~above, v);
    }

    CollectVisitor& visitor_;
    const typename Scorer<A, Map>::template Strip<kRows> score_;
    const Lanes<A> lo_, hi_;
    A* gathered_ = visitor_.gathered_;
    A* end_;
    BitCount above_, not_finite_;
  };

 private:
  static constexpr int kFlushFrom = 1024;

  void flush() {
    const int64_t found = end_ - kept_;
    if (found == 0) return;
    // Whole words: the last is filled up with a value that is there anyway.
    for (int i = 0; i < kLanes; ++i) end_[i] = kept_[0];
    Lanes<A> least = load(kept_), largest = least;
    for (int64_t i = kLanes; i < found; i += kLanes) {
      least = smaller(least, load(kept_ + i));
      largest = larger(largest, load(kept_ + i));
    }
    A lane[2][kLanes];
    store(lane[0], least);
    store(lane[1], largest);
    for (const A v : lane[0]) counts_.least = std::min<double>(counts_.least, v);
    for (const A v : lane[1]) counts_.largest = std::max<double>(counts_.largest, v);
    const int64_t at = __atomic_fetch_add(collection_.found, found, __ATOMIC_RELAXED);
    const int64_t room = collection_.capacity - at;
    if (room > 0) std::memcpy(collection_.values + at, kept_, std::min(found, room) * sizeof(A));
    end_ = kept_;
  }

  Scorer<A, Map> scorer_;
  const Collection<A>& collection_;
  CollectCounts counts_ = {0, 0, 0, std::numeric_limits<double>::infinity(),
                           -std::numeric_limits<double>::infinity()};
  A* end_ = kept_;
  A kept_[kFlushFrom + kRowsAtOnce * kTileColumns + kLanes];
  A gathered_[kTileColumns + kLanes];
};

// Writes the scores out, 0 off the mask.
template <typename A>
class WriteVisitor {
 public:
  WriteVisitor(const Weights& w, const Block& block, const ScoreFlows<A>& flows, A* scores)
      : scorer_(w, block, flows), scores_(scores), columns_(w.columns) {}

  PP_INLINE int passes() const { return 1; }
  PP_INLINE void enter(const Tile& tile, int) { scorer_.enter(tile); }

  template <int kRows>
  class Strip {
   public:
    PP_INLINE Strip(WriteVisitor& visitor, const Tile& tile, int first)
        : score_(visitor.scorer_, first), pitch_(visitor.columns_), rest_(tile.rest) {
      scores_ = visitor.scores_ + (tile.flat_row + first) * pitch_ + tile.first_column();
      rest_word_ = tile.rest ? tile.words - 1 : kTileWords;
      // Single rows are shown at their live words only.
      if (kRows == 1) std::memset(scores_, 0, tile.columns() * sizeof(A));
    }

    PP_INLINE void operator()(int word, const Lanes<A> (&w)[kRows], const Bits (&live)[kRows]) {
      const Mapped<A, kRows> sg = score_.weigh(score_.map(w));
#pragma GCC unroll 4
      for (int j = 0; j < kRows; ++j) {
        const Lanes<A> v = keep(live[j], score_(word, j, sg.row[j]));
        A* to = scores_ + j * pitch_ + kWordColumns * word;
        if (word == rest_word_) [[unlikely]] {
          A lane[kLanes];
          store(lane, v);
          std::memcpy(to, lane, rest_ * sizeof(A));
        } else {
          store(to, v);
        }
      }
    }

    PP_INLINE void finish() {}

   private:
    const typename Scorer<A>::template Strip<kRows> score_;
    int64_t pitch_;
    int rest_, rest_word_;
    A* scores_;
  };

 private:
  Scorer<A> scorer_;
  A* scores_;  // [groups, rows, columns]
  int64_t columns_;
};

// Counts the live scores within a span.
template <typename A>
class CountVisitor {
 public:
  CountVisitor(const Weights& w, const Block& block, const ScoreFlows<A>& flows,
               const Span<A>& span)
      : scorer_(w, block, flows), span_(span) {}

  PP_INLINE int passes() const { return 1; }
  PP_INLINE void enter(const Tile& tile, int) { scorer_.enter(tile); }
  int64_t count() const { return count_; }

  template <int kRows>
  class Strip {
   public:
    PP_INLINE Strip(CountVisitor& visitor, const Tile&, int first)
        : visitor_(visitor),
          score_(visitor.scorer_, first),
          at_least_(broadcast(visitor.span_.at_least)),
          below_(broadcast(visitor.span_.below)) {}

    PP_INLINE void operator()(int word, const Lanes<A> (&w)[kRows], const Bits (&live)[kRows]) {
      const Mapped<A, kRows> sg = score_.weigh(score_.map(w));
#pragma GCC unroll 4
      for (int j = 0; j < kRows; ++j) {
        const Lanes<A> v = score_(word, j, sg.row[j]);
        within_.add(more_than(at_least(live[j], v, at_least_), below_, v));
      }
    }

    PP_INLINE void finish() { visitor_.count_ += within_.total(); }

   private:
    CountVisitor& visitor_;
    const typename Scorer<A>::template Strip<kRows> score_;
    const Lanes<A> at_least_, below_;
    BitCount within_;
  };

 private:
  Scorer<A> scorer_;
  const Span<A> span_;
  int64_t count_ = 0;
};

// Clears the mask bits of the weights that do not stay.
template <typename A, typename Map = AnyMap<A>>
class PruneVisitor {
 public:
  PruneVisitor(const Weights& w, const Block& block, const ScoreFlows<A>& flows,
               const Stay<A>& stay, uint16_t* mask)
      : scorer_(w, block, flows),
        before_cut_(std::min(stay.at_least, stay.above)),
        after_cut_(stay.above),
        cut_(stay.cut),
        mask_(mask),
        words_(w.words),
        columns_(w.columns) {}

  PP_INLINE int passes() const { return 1; }
  PP_INLINE void enter(const Tile& tile, int) { scorer_.enter(tile); }

  template <int kRows>
  class Strip {
   public:
    PP_INLINE Strip(PruneVisitor& visitor, const Tile& tile, int first)
        : visitor_(visitor), score_(visitor.scorer_, first) {
      const int64_t row = tile.flat_row + first;
      mask_ = visitor.mask_ + row * visitor.words_ + tile.index * kTileWords;
#pragma GCC unroll 4
      for (int j = 0; j < kRows; ++j) {
        const int64_t index = (row + j) * visitor.columns_ + tile.first_column();
        const int64_t before = visitor.cut_ - index;
        bound_[j] = broadcast(before > 0 ? visitor.before_cut_ : visitor.after_cut_);
        before_[j] = before > 0 && before < kTileColumns ? static_cast<int>(before) : kTileColumns;
      }
    }

    PP_INLINE Mapped<A, kRows> map(const Lanes<A> (&w)[kRows]) const { return score_.map(w); }

    PP_INLINE void operator()(int word, const Lanes<A> (&w)[kRows], const Bits (&live)[kRows]) {
      Bits stays[kRows];
      take(word, map(w), live, stays);
    }

    PP_INLINE void take(int word, const Mapped<A, kRows>& s, const Bits (&live)[kRows],
                        Bits (&stays)[kRows]) {
      const Mapped<A, kRows> sg = score_.weigh(s);
#pragma GCC unroll 4
      for (int j = 0; j < kRows; ++j) {
        if (kWordColumns * (word + 1) > before_[j]) [[unlikely]]
          cross(j, word);
        stays[j] = at_least(live[j], score_(word, j, sg.row[j]), bound_[j]);
        mask_[j * visitor_.words_ + word] = static_cast<uint16_t>(stays[j]);
      }
    }

    PP_INLINE void finish() {}

   private:
    // From the lane of the cut on, the larger bound is in force.
    PP_INLINE void cross(int j, int word) {
      A bound[kLanes];
      for (int i = 0; i < kLanes; ++i) {
        const bool is_before = kWordColumns * word + i < before_[j];
        bound[i] = is_before ? visitor_.before_cut_ : visitor_.after_cut_;
      }
      bound_[j] = load(bound);
    }

    PruneVisitor& visitor_;
    const typename Scorer<A, Map>::template Strip<kRows> score_;
    uint16_t* mask_;
    Lanes<A> bound_[kRows];
    int before_[kRows];  // columns of the tile that lie before the cut
  };

 private:
  Scorer<A, Map> scorer_;
  A before_cut_, after_cut_;  // what a score must reach
  int64_t cut_;
  uint16_t* mask_;
  int64_t words_, columns_;
};

}  // namespace pathprune::PATHPRUNE_ISA
