// How the CUDA kernels cut weights up, as plain arithmetic that the host can check.
//
// A tile is one row by 512 columns: 32 mask words, one for each lane of the warp that reads it. The
// columns are dealt to the lanes in vectors of 16 bytes - lane 0 the first, lane 1 the second, ...
// - so that a load of the warp covers 512 adjacent bytes, and every lane has 16 columns of a tile
// whatever the type of the weights. The tiles of a row lie beside each other, then come those of
// the next row; a row's last tile may be short.
//
// Whatever a sum is formed over - lanes, warps, row blocks - is cut by shapes alone, never by the
// GPU, so a result is the same to the bit on every run and on every GPU.

#pragma once

#include <cstdint>

#include "core/bits.h"
#include "core/macros.h"

namespace pathprune::cuda {

inline constexpr int kLanes = 32;
inline constexpr int kWarps = 8;  // of a block
inline constexpr int kThreads = kWarps * kLanes;
inline constexpr int kTileWords = kLanes;
inline constexpr int kTileColumns = kTileWords * kWordBits;
inline constexpr int kLaneColumns = kTileColumns / kLanes;
inline constexpr int kVectorBytes = 16;

// How many of a type are in a vector.
template <typename T>
inline constexpr int kVector = kVectorBytes / static_cast<int>(sizeof(T));

PP_HD int64_t tiles_of_row(int64_t words) { return ceil_divide(words, kTileWords); }

// Where in the tile a lane's i-th column is, i < 16, for `vector` columns in a vector.
PP_HD int lane_column(int vector, int lane, int i) {
  return (i / vector * kLanes + lane) * vector + i % vector;
}

// The columns that exist in word c of a row, as bits.
PP_HD uint32_t columns_in_word(int64_t columns, int64_t c) {
  const int64_t left = columns - c * kWordBits;
  if (left >= kWordBits) return 0xFFFF;
  return left <= 0 ? 0 : (uint32_t{1} << left) - 1;
}

// The bits of a word that come before bit `place`.
PP_HD uint32_t bits_before(uint32_t word, int place) { return word & ((uint32_t{1} << place) - 1); }

// How many warps share a row whose sum is wanted: each gets at least four tiles or so to hide the
// cost of adding them up, and long rows are not left to one warp.
PP_HD int warps_of_row(int64_t tiles) {
  return tiles <= 4 ? 1 : tiles <= 8 ? 2 : tiles <= 16 ? 4 : kWarps;
}

// Sums over rows are formed over each of a few blocks of rows first. Blocks of 64 rows give a layer
// of 4096 x 4096 to 4096 warps and cost 1/64 of the weights' bytes in sums; 128 blocks at the most.
PP_HD int64_t rows_of_block(int64_t rows) {
  constexpr int64_t kLeast = 64, kBlocks = 128;
  const int64_t even = ceil_divide(ceil_divide(rows, kBlocks), kWarps) * kWarps;
  return even > kLeast ? even : kLeast;
}
// At least one, so that the sums over no rows are written too.
PP_HD int64_t blocks_of_rows(int64_t rows) {
  return rows > 0 ? ceil_divide(rows, rows_of_block(rows)) : 1;
}

// The n-th weight is looked for by counting in chunks of successive tiles.
PP_HD int64_t chunks_of_tiles(int64_t tiles) {
  constexpr int64_t kChunks = 8192;
  return tiles < kChunks ? tiles : kChunks;
}
// Where chunk c of `chunks` begins among `tiles`; chunk `chunks` begins at their end.
PP_HD int64_t chunk_begin(int64_t tiles, int64_t chunks, int64_t c) {
  return tiles / chunks * c + tiles % chunks * c / chunks;
}

}  // namespace pathprune::cuda
