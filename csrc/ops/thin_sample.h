// The gradient of a convolution by those of its weights that a mask keeps. Images lie in the lanes,
// so what a weight reads are whole vectors, whatever its shift and the stride:
//
//     dw[o, c, i, j] = sum over positions and lanes of g[o, p] * x[c, p * stride + (i, j)].

#pragma once

#include <cstdint>

#include "core/isa.h"

namespace pathprune {

// The weights of one row among those of a few channels.
struct SampleRun {
  int32_t row;  // of g
  int32_t begin, end;
};

// Positions that are summed over at once.
template <typename A>
struct SampleTile {
  const A* x;               // of the first position, before the shifts
  const A* g;               // of the first row and position
  int64_t g_plane;          // from a row of g to the next
  int64_t height, width;    // positions
  int64_t x_pitch, x_step;  // from a position to the one below, to the next
  int64_t g_pitch;          // to the one below; the next is the next vector
};

template <typename A>
struct SampleKernels {
  int64_t group;  // so many sums, from any weight's on, may be written to
  // Adds to the sums of the weights of all runs, which read x shifted by `shifts`.
  void (*add)(const SampleRun* runs, int64_t count, const int32_t* shifts,
              const SampleTile<A>& tile, A* sums);
};

PP_IN_EVERY_ISA(template <typename A> SampleKernels<A> sample_kernels();)

}  // namespace pathprune
