// Convolutions by weights that are mostly zeros. Images lie in the lanes, so what a weight reads
// are whole vectors, whatever its shift and the stride:
//
//     y[o, p] = bias[o] + sum over the weights of row o of w * x[c, p * stride + (i, j)].

#pragma once

#include <cstdint>

#include "core/isa.h"
#include "ops/thin_lanes.h"

namespace pathprune {

// Outputs that are made at once.
template <typename A>
struct ThinTile {
  const A* x;               // of the first position, before the shifts
  A* y;                     // of the first row and position
  const A* start;           // of the sums of every row; null: from what y holds
  int64_t y_plane;          // from a row of y to the next
  int64_t height, width;    // positions
  int64_t x_pitch, x_step;  // from a position to the one below, to the next
  int64_t y_pitch;          // to the one below; the next is the next vector
};

// Weights of some channels, row after row.
template <typename A>
struct ThinEntries {
  const int64_t* begin;  // [rows + 1], of every row
  const int32_t* shifts;
  const A* values;
};

template <typename A>
struct ThinKernels {
  ThinTileSize tile;
  void (*add)(const ThinEntries<A>& w, int64_t rows, const ThinTile<A>& tile);
};

PP_IN_EVERY_ISA(template <typename A> ThinKernels<A> thin_kernels();)

}  // namespace pathprune
