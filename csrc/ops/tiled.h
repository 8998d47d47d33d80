// Products with masked weights, computed dense, tile by tile: what the kernels take, and how the
// work is cut up. Plain arithmetic that the host can check.
//
// A weight is given with a bit for each entry (`layout`), dense or packed to the entries whose bit
// is one, in order. Of packed weights `index` has their columns, and `tile_start` says where the
// entries of each stretch of 64 columns begin, so that a tile can begin anywhere.

#pragma once

#include <cstdint>

#include "core/bits.h"
#include "core/macros.h"
#include "ops/tile_cuda.h"
#include "ops/weights.h"

namespace pathprune::cuda {

inline constexpr int kStretch = 64;  // columns
inline constexpr int kStretchWords = kStretch / kWordBits;

PP_HD int64_t stretches_of_row(int64_t columns) { return ceil_divide(columns, kStretch); }

struct MaskedWeight {
  const void* values;         // dense: [groups, rows, stride]; packed: [stored]
  Storage storage;            // not float64
  const uint16_t* layout;     // [groups, rows, words]
  const uint16_t* index;      // packed: [stored]: columns, modulo 2^16
  const int32_t* tile_start;  // packed: [groups * rows * stretches + 1]; null: dense
  int64_t groups, rows, columns, words, stretches;
  int64_t stride;  // of dense rows: columns, and as many more as make whole vectors
};

// The depth that is summed over - columns, rows or positions - is cut into parts where there are
// too few tiles of sums to occupy a GPU: into as many as give two blocks to each of the 132
// multiprocessors of an H200, but no part of fewer than 128. Shapes alone decide, never the GPU
// that there is, so results are the same on every one.
PP_HD int64_t parts_of_depth(int64_t tiles, int64_t depth) {
  constexpr int64_t kBlocks = 264, kLeast = 128;
  const int64_t wanted = tiles > 0 ? kBlocks / tiles : 1, most = depth / kLeast;
  const int64_t parts = wanted < most ? wanted : most;
  return parts > 1 ? parts : 1;
}

// Up to so many positions make a narrow tile.
inline constexpr int64_t kNarrow = 32;

// Positions, or columns, of a tile of sums, and how deep the tiles are that it is made of: as wide
// as the registers for sums allow, as deep as 48 KB of shared memory do.
struct TileShape {
  int width, depth;
};
template <typename W>
inline constexpr TileShape kNarrowTile = {32, 256 / static_cast<int>(sizeof(W))};
template <typename W>
inline constexpr TileShape kWideTile = {64, 128 / static_cast<int>(sizeof(W))};
template <typename W>
inline constexpr TileShape kSampleTile = sizeof(W) == 2 ? TileShape{128, 32} : TileShape{64, 16};

inline constexpr int kTileRows = 128;

// Rows, columns, positions, and blocks, each of which takes a tile of sums and a part of the depth,
// are counted in 32 bits.
inline constexpr int64_t kMostCounted = int64_t{1} << 30;

PP_HD int tiles_of(int64_t length, int side) { return static_cast<int>(ceil_divide(length, side)); }

PP_HD int begin_of_part(int steps, int parts, int part) {
  return static_cast<int>(int64_t{steps} * part / parts);
}

// Calls body.template operator()<W>() for the type of the values.
template <typename Body>
auto by_tiled_storage(Storage storage, const Body& body) {
  switch (storage) {
    case Storage::kBfloat16:
      return body.template operator()<Bfloat16>();
    case Storage::kFloat16:
      return body.template operator()<Float16>();
    default:
      return body.template operator()<float>();
  }
}

inline int64_t parts_of_product(const MaskedWeight& w, bool transposed, int64_t positions) {
  return by_tiled_storage(w.storage, [&]<typename W>() {
    const int64_t width = positions <= kNarrow ? kNarrowTile<W>.width : kWideTile<W>.width;
    const int64_t out = transposed ? w.columns : w.rows, in = transposed ? w.rows : w.columns;
    const int64_t tiles = ceil_divide(out, kTileRows) * ceil_divide(positions, width);
    return parts_of_depth(w.groups * tiles, in);
  });
}

inline int64_t parts_of_sample(const MaskedWeight& w, int64_t positions) {
  return by_tiled_storage(w.storage, [&]<typename W>() {
    const int64_t wide = ceil_divide(w.columns, kSampleTile<W>.width);
    return parts_of_depth(w.groups * ceil_divide(w.rows, kTileRows) * wide, positions);
  });
}

}  // namespace pathprune::cuda
