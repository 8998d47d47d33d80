// Images in the lanes, for convolutions by weights that are mostly zeros: what a kernel entry reads
// are whole vectors, whatever its shift and the stride.

#pragma once

#include <cstdint>

#include "core/isa.h"

namespace pathprune {

inline constexpr int kMostThinLanes = 16;

// At most so many positions are worked on at once.
struct ThinTileSize {
  int64_t positions, width, height;
};

template <typename A>
struct LaneKernels {
  int64_t lanes;
  // to[i / width * pitch + i % width * lanes + lane] = from[lane][i]; 0 where from is null
  void (*lay)(const A* const* from, int64_t count, int64_t width, int64_t pitch, A* to);
  // to[lane][i] = from[i * lanes + lane], where `to` is not null
  void (*take)(const A* from, int64_t count, A* const* to);
};

PP_IN_EVERY_ISA(template <typename A> LaneKernels<A> lane_kernels();)

}  // namespace pathprune
