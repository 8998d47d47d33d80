// How a pass over weights is cut up. A tile is one row by 64 mask words; a block is a few rows by a
// few tiles, and is what one thread takes at a time. Every cut depends on shapes alone, and sums
// are formed per tile and per block, so that results do not depend on the number of threads.

#pragma once

#include <algorithm>
#include <array>
#include <cstdint>

#include "ops/weights.h"

namespace pathprune {

inline constexpr int kWordColumns = 16;
inline constexpr int kTileWords = 64;
inline constexpr int kTileColumns = kTileWords * kWordColumns;
inline constexpr int kBlockTiles = 16;
inline constexpr int kBlockWeights = 1 << 16;

// Rows that are read side by side (a strip), so that the flows of their columns are read once for
// all.
inline constexpr int kRowsAtOnce = 4;
// Positions of a flow that are summed side by side, when there is more than one.
inline constexpr int kPositionsAtOnce = 4;

struct Block {
  int64_t group;
  int64_t row_begin, row_end;  // within the group
  int64_t tile_begin, tile_end;
  int64_t row_block, tile_block;
};

struct Grid {
  int64_t groups, rows, tiles;
  int64_t block_rows, row_blocks, tile_blocks;

  Grid(const Weights& w, int64_t block_rows)
      : groups(w.groups),
        rows(w.rows),
        tiles((w.words + kTileWords - 1) / kTileWords),
        block_rows(block_rows),
        row_blocks((rows + block_rows - 1) / block_rows),
        tile_blocks((tiles + kBlockTiles - 1) / kBlockTiles) {}

  int64_t size() const { return groups * row_blocks * tile_blocks; }

  // Blocks are numbered in the order in which the weights lie in memory.
  Block operator[](int64_t index) const {
    Block block;
    block.tile_block = index % tile_blocks;
    block.row_block = index / tile_blocks % row_blocks;
    block.group = index / tile_blocks / row_blocks;
    block.row_begin = block.row_block * block_rows;
    block.row_end = std::min(rows, block.row_begin + block_rows);
    block.tile_begin = block.tile_block * kBlockTiles;
    block.tile_end = std::min(tiles, block.tile_begin + kBlockTiles);
    return block;
  }
};

inline int64_t whole_strips(int64_t rows) {
  return (std::max<int64_t>(rows, 1) + kRowsAtOnce - 1) / kRowsAtOnce * kRowsAtOnce;
}

// For what is computed row by row: blocks of about equal work.
inline Grid row_grid(const Weights& w) {
  const int64_t columns = std::clamp<int64_t>(w.columns, kWordColumns, kBlockTiles * kTileColumns);
  return Grid(w, whole_strips(kBlockWeights / columns));
}

// For sums over rows: each row block has sums of its own, so there are at most 32 of them. Sums of
// sums are also more exact than one long sum.
inline Grid column_grid(const Weights& w) {
  return Grid(w, whole_strips(std::max<int64_t>(64, (w.rows + 31) / 32)));
}

// One long dense row as many short ones and what is left of it, for what does not depend on the
// row: rows are read side by side.
inline std::array<Weights, 2> cut_row(const Weights& w) {
  constexpr int64_t kColumns = 4 * kTileColumns;
  Weights cut = w, rest = w;
  cut.rows = w.columns / kColumns;
  cut.columns = kColumns;
  cut.words = kColumns / kWordColumns;
  rest.columns = w.columns % kColumns;
  rest.words = w.words - cut.rows * cut.words;
  const int64_t size = w.storage == Storage::kFloat64 ? 8 : w.storage == Storage::kFloat32 ? 4 : 2;
  rest.values = static_cast<const char*>(w.values) + cut.rows * kColumns * size;
  if (w.mask) rest.mask = w.mask + cut.rows * cut.words;
  return {cut, rest};
}

// For what depends on the order of the weights: all weights of a block come before those of the
// next.
inline Grid flat_grid(const Weights& w) {
  const Grid grid = row_grid(w);
  return grid.tile_blocks > 1 ? Grid(w, 1) : grid;
}

}  // namespace pathprune
