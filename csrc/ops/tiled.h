// Products with masked weights, computed dense, tile by tile: what the kernels take, and how the
// work is cut up. Plain arithmetic that the host can check.
//
// A weight is given with a bit for each entry (`layout`), dense or packed to the entries whose bit
// is one, in order. Of packed weights `tile_start` says where the entries of each stretch of 128
// columns begin: from there bits tell, so a tile can begin anywhere.

#pragma once

#include <cstdint>

#include "core/bits.h"
#include "core/macros.h"
#include "ops/tile_cuda.h"
#include "ops/weights.h"

namespace pathprune::cuda {

inline constexpr int kStretch = 128;  // columns; their bits are a vector of 16 bytes
inline constexpr int kStretchWords = kStretch / kWordBits;

PP_HD int64_t stretches_of_row(int64_t columns) { return ceil_divide(columns, kStretch); }

struct MaskedWeight {
  const void* values;         // dense: [groups, rows, columns]; packed: [stored]
  Storage storage;            // not float64
  const uint16_t* layout;     // [groups, rows, words]
  const int32_t* tile_start;  // packed: [groups * rows, stretches]; null: dense
  int64_t groups, rows, columns, words, stretches;
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
// as the registers for sums allow, as deep as 48 KB of shared memory do, twice.
struct TileShape {
  int width, depth;
};
template <typename W>
inline constexpr TileShape kNarrowTile = {32, 128 / static_cast<int>(sizeof(W))};
template <typename W>
inline constexpr TileShape kWideTile = sizeof(W) == 2 ? TileShape{128, 32} : TileShape{64, 32};
template <typename W>
inline constexpr TileShape kSampleTile = sizeof(W) == 2 ? TileShape{128, 32} : TileShape{64, 16};

inline constexpr int kTileRows = 128;

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
