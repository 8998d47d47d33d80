// The walk over the weights of a block that every pass takes: strip by strip, tile by tile. What is
// done with the weights is said by visitors:
//
//     class Visitor {
//       int passes();                    // how often each tile is visited
//       void enter(const Tile&, int pass);
//       template <int kRows> class Strip {
//         Strip(Visitor&, const Tile&, int first);  // rows first .. first + kRows - 1 of the tile
//         void operator()(int word, const Lanes<A> (&w)[kRows], const Bits (&live)[kRows]);
//         void finish();
//       };
//     };
//
// Several visitors take turns at each tile, so that the weights come from memory for the first of
// them alone. A tile with few live words is visited row by row, and only at these words.

#pragma once

#include <algorithm>

#include "ops/lane_weights.h"
#include "ops/sweep.h"

namespace pathprune::PATHPRUNE_ISA {

// The part of a strip that is one tile wide.
struct Tile {
  int64_t group, row, flat_row;  // the first row, in its group and in all groups
  int64_t index;                 // which tile of the row
  int rows, words;
  int rest;              // columns of the last word, where it is short; else 0
  const uint16_t* mask;  // [rows, words], mask_pitch apart
  int64_t mask_pitch;    // 0 where every weight is live

  PP_INLINE int whole_words() const { return rest ? words - 1 : words; }
  PP_INLINE int64_t first_word() const { return index * kTileWords; }
  PP_INLINE int64_t first_column() const { return index * kTileColumns; }
  PP_INLINE int columns() const { return kWordColumns * whole_words() + rest; }
  PP_INLINE const uint16_t* mask_row(int j) const { return mask + j * mask_pitch; }
};

namespace sweeping {

inline constexpr struct AllLive {
  uint16_t words[kTileWords];
  constexpr AllLive() : words() {
    for (uint16_t& word : words) word = 0xFFFF;
  }
} kAllLive;

PP_INLINE int64_t count_bits(const uint16_t* words, int64_t count) {
  int64_t bits = 0, i = 0;
  for (; i + 4 <= count; i += 4) {
    uint64_t four;
    std::memcpy(&four, words + i, sizeof(four));
    bits += __builtin_popcountll(four);
  }
  for (; i < count; ++i) bits += __builtin_popcount(words[i]);
  return bits;
}

// Side by side pays for float32 and for wide vectors; elsewhere it would only make code.
template <typename A>
inline constexpr bool kSideBySide = sizeof(A) == sizeof(float) && kVectorBytes > 16;

// Weights as they are stored, to be fetched while others are worked on.
struct Upcoming {
  const char* first = nullptr;
  int64_t pitch = 0;  // bytes from row to row
  int64_t word = 0;   // bytes of a word's weights

  PP_INLINE void fetch(int row, int word_index) const {
    __builtin_prefetch(first + row * pitch + word_index * word, 0, 2);
  }
};

template <typename W, typename Strip>
PP_INLINE void visit_rows(const Tile& tile, const W* values,  // [kRowsAtOnce, columns]
                          int64_t pitch, const Upcoming& upcoming, Strip& strip) {
  Lanes<Accumulate<W>> w[kRowsAtOnce];
  Bits live[kRowsAtOnce];
  const int whole = tile.whole_words();
  for (int i = 0; i < whole; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < kRowsAtOnce; ++j) {
      upcoming.fetch(j, i);
      w[j] = load_wide(values + j * pitch + kWordColumns * i);
      live[j] = tile.mask_row(j)[i];
    }
    strip(i, w, live);
  }
  if (tile.rest) {
#pragma GCC unroll 4
    for (int j = 0; j < kRowsAtOnce; ++j) {
      w[j] = load_first_wide(values + j * pitch + kWordColumns * whole, tile.rest);
      live[j] = tile.mask_row(j)[whole] & first_lanes(tile.rest);
    }
    strip(whole, w, live);
  }
}

template <typename W, typename Strip>
PP_INLINE void visit_words(const Tile& tile, const W* values,  // [columns]
                           const uint16_t* mask, uint64_t live_words, Strip& strip) {
  const int whole = tile.whole_words();
  // Among dead words most of what lies ahead is not needed.
  const int64_t ahead = live_words == ~uint64_t{0} ? kTileColumns : 0;
  for (uint64_t todo = live_words; todo; todo &= todo - 1) {
    const int i = __builtin_ctzll(todo);
    __builtin_prefetch(values + kWordColumns * i + ahead);
    Lanes<Accumulate<W>> w[1];
    Bits live[1] = {mask[i]};
    if (i < whole) {
      w[0] = load_wide(values + kWordColumns * i);
    } else {
      w[0] = load_first_wide(values + kWordColumns * i, tile.rest);
      live[0] &= first_lanes(tile.rest);
    }
    strip(i, w, live);
  }
}

// Dense weights, stored as W, four rows at once unless most words are dead.
template <typename W>
class DenseTiles {
 public:
  using A = Accumulate<W>;
  static constexpr int kRows = kSideBySide<A> ? kRowsAtOnce : 1;

  DenseTiles(const Weights& w, const Block& block)
      : stored_(static_cast<const W*>(w.values)),
        pitch_(w.columns),
        last_tile_(block.tile_end - 1) {}

  PP_INLINE void enter_strip(const Tile& tile) {
    next_strip_ = (tile.flat_row + kRows) * pitch_ + tile.first_column();
  }

  PP_INLINE void enter(const Tile& tile) {
    const int64_t first = tile.flat_row * pitch_ + tile.first_column();
    const int64_t next = tile.index < last_tile_ ? first + kTileColumns : next_strip_;
    values_ = stored_ + first;
    upcoming_ = {reinterpret_cast<const char*>(stored_ + next),
                 pitch_ * static_cast<int64_t>(sizeof(W)), kWordColumns * sizeof(W)};
  }

  template <typename Visitor>
  PP_INLINE void visit(const Tile& tile, Visitor& visitor) const {
    uint64_t live_words[kRows];
    int live = 0;
    for (int j = 0; j < tile.rows; ++j) {
      live_words[j] = nonzero_words(tile.mask_row(j), tile.words);
      live += __builtin_popcountll(live_words[j]);
    }
    if constexpr (kSideBySide<A>) {
      if (tile.rows == kRowsAtOnce && 4 * live >= kRowsAtOnce * tile.words) {
        typename Visitor::template Strip<kRowsAtOnce> strip(visitor, tile, 0);
        visit_rows(tile, values_, pitch_, upcoming_, strip);
        strip.finish();
        return;
      }
    }
    for (int j = 0; j < tile.rows; ++j) {
      typename Visitor::template Strip<1> strip(visitor, tile, j);
      visit_words(tile, values_ + j * pitch_, tile.mask_row(j), live_words[j], strip);
      strip.finish();
    }
  }

  PP_INLINE void leave(const Tile&) {}

 private:
  const W* stored_;
  int64_t pitch_;
  int64_t last_tile_, next_strip_ = 0;
  const W* values_ = nullptr;  // [rows, columns], pitch apart
  Upcoming upcoming_;
};

// Packed weights, row by row: what is stored is then read from one end to the other.
template <typename A>
class PackedTiles {
 public:
  static constexpr int kRows = 1;

  PackedTiles(const Weights& w, const Block&) : w_(w) {}

  PP_INLINE void enter_strip(const Tile& tile) {
    layout_ = w_.layout + tile.flat_row * w_.words;
    begin_ = w_.row_start[tile.flat_row] + count_bits(layout_, tile.first_word());
    layout_ += tile.first_word();
  }

  void enter(const Tile& tile) {
    stored_ = static_cast<const A*>(w_.values) + begin_;
    if constexpr (sizeof(A) == sizeof(float)) {
      if (w_.storage != Storage::kFloat32) {
        widen_values(w_, begin_, count_bits(layout_, tile.words) + kLanes, widened_);
        stored_ = widened_;
      }
    }
  }

  template <typename Visitor>
  PP_INLINE void visit(const Tile& tile, Visitor& visitor) {
    typename Visitor::template Strip<1> strip(visitor, tile, 0);
    const A* stored = stored_;
    for (uint64_t todo = nonzero_words(layout_, tile.words); todo; todo &= todo - 1) {
      const int i = __builtin_ctzll(todo);
      const Bits live[1] = {tile.mask[i]};
      __builtin_prefetch(stored + kTileColumns);
      if (live[0]) {
        const Lanes<A> w[1] = {expand(layout_[i], stored)};
        strip(i, w, live);
      }
      stored += __builtin_popcount(layout_[i]);
    }
    strip.finish();
    count_ = stored - stored_;
  }

  PP_INLINE void leave(const Tile& tile) {
    begin_ += count_;
    layout_ += tile.words;
  }

 private:
  const Weights& w_;
  const uint16_t* layout_ = nullptr;  // [words] of the tile
  int64_t begin_ = 0, count_ = 0;     // its stored values
  const A* stored_ = nullptr;
  A widened_[sizeof(A) == sizeof(float) ? kTileColumns + kLanes : 1];
};

template <typename Tiles, typename Visitor>
PP_INLINE void visit_passes(Tiles& tiles, const Tile& tile, Visitor& visitor) {
  const int passes = visitor.passes();
  for (int pass = 0; pass < passes; ++pass) {
    visitor.enter(tile, pass);
    tiles.visit(tile, visitor);
  }
}

template <typename Tiles, typename... Visitors>
void sweep_block(const Weights& w, const Block& block, Visitors&... visitors) {
  Tiles tiles(w, block);
  Tile tile;
  tile.group = block.group;
  for (tile.row = block.row_begin; tile.row < block.row_end; tile.row += Tiles::kRows) {
    tile.flat_row = block.group * w.rows + tile.row;
    tile.rows = static_cast<int>(std::min<int64_t>(Tiles::kRows, block.row_end - tile.row));
    tile.index = block.tile_begin;
    tiles.enter_strip(tile);
    for (; tile.index < block.tile_end; ++tile.index) {
      tile.words = static_cast<int>(std::min<int64_t>(kTileWords, w.words - tile.first_word()));
      const bool is_last = tile.first_word() + tile.words == w.words;
      tile.rest = is_last ? static_cast<int>(w.columns % kWordColumns) : 0;
      tile.mask = w.mask ? w.mask + tile.flat_row * w.words + tile.first_word() : kAllLive.words;
      tile.mask_pitch = w.mask ? w.words : 0;
      tiles.enter(tile);
      (visit_passes(tiles, tile, visitors), ...);
      tiles.leave(tile);
    }
  }
}

}  // namespace sweeping

// Shows every live weight of the block to the visitors.
template <typename A, typename... Visitors>
void sweep(const Weights& w, const Block& block, Visitors&... visitors) {
  using namespace sweeping;
  if (w.layout) return sweep_block<PackedTiles<A>>(w, block, visitors...);
  if constexpr (sizeof(A) == sizeof(float)) {
    if (w.storage == Storage::kBfloat16) {
      return sweep_block<DenseTiles<Bfloat16>>(w, block, visitors...);
    }
    if (w.storage == Storage::kFloat16) {
      return sweep_block<DenseTiles<Float16>>(w, block, visitors...);
    }
  }
  sweep_block<DenseTiles<A>>(w, block, visitors...);
}

}  // namespace pathprune::PATHPRUNE_ISA
