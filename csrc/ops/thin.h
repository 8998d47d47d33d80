// Convolutions by weights that are mostly zeros. Images are laid flat with their padding, a few at
// a time and plane after plane, so that what a kernel entry reads is what the output reads, a fixed
// way further on: y[o, t] = sum_i values[i] x[shifts[i] + t].

#pragma once

#include <cstdint>

#include "core/isa.h"

namespace pathprune {

// One or two rows of weights that are made together, without the entries that are zero in all.
struct ThinRows {
  int64_t row;
  int32_t count;         // 1 or 2
  bool lacks[2];         // this row is what is left of `whole`
  int64_t begin, end;    // among the shifts
  int64_t values_begin;  // `count` values for every shift
};

// Where positions of a tile belong.
struct ThinSegment {
  int32_t from, count;  // in the tile
  int64_t to;           // in the plane of every row
};

template <typename A>
struct ThinTile {
  const int32_t* shifts;
  const A* values;
  const A* x;      // of the tile's first position
  const A* whole;  // [tile], for rows that lack
  const A* bias;   // [rows], or null
  int64_t positions;
  const ThinSegment* segments = nullptr;
  int64_t segment_count = 0;
  A* y = nullptr;
  int64_t plane = 0;  // from a row of y to the next
};

template <typename A>
struct ThinKernels {
  int64_t tile;  // positions that are made at once; so many are read from every shift on
  void (*multiply)(const ThinRows* rows, int64_t count, const ThinTile<A>& tile);
};

PP_IN_EVERY_ISA(template <typename A> ThinKernels<A> thin_kernels();)

}  // namespace pathprune
