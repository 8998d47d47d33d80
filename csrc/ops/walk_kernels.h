// What the walk ops take on the CPU, and the table of kernels that each instruction set fills in.

#pragma once

#include <cstdint>

#include "core/isa.h"
#include "ops/walk.h"

namespace pathprune {

// Memory for one unit's distribution, allocated by the caller.
struct WalkScratch {
  double* weights;   // [candidates]
  uint64_t* cdf;     // [candidates rounded up to a power of two]
  void* transposed;  // a tile of columns, each made contiguous with this pitch
  int64_t pitch;     // in values
};

struct WalkKernels {
  // Moves the walkers at `unit`, whose numbers are order[0, count), given the unit's own values
  // (with a mass: its own masses) side by side.
  void (*unit)(const WalkMatrix&, const WalkRule&, const Walkers&, const WalkScratch&,
               const void* values, int64_t unit, const uint32_t* order, int64_t count);
  // Moves the walkers at `unit` and one position, to a unit and a position in proportion to the
  // flow beyond. The scratch holds every entry of every candidate.
  void (*field)(const WalkMatrix&, const WalkRule&, const WalkField&, const Walkers&,
                const WalkScratch&, int64_t unit, int64_t position, const uint32_t* order,
                int64_t count);
  // candidate_weight of kernels [begin, end).
  void (*mass)(const WalkMatrix&, const WalkRule&, int64_t begin, int64_t end, double* mass);
  // Copies `count` columns (of the masses, if there are) from `column` of a group on to
  // scratch.transposed, one after the other.
  void (*transpose)(const WalkMatrix&, const WalkRule&, const WalkScratch&, int64_t group,
                    int64_t column, int64_t count);
};

#define PP_DECLARE_KERNELS(isa) \
  namespace isa {               \
  WalkKernels walk_kernels();   \
  }
PP_DECLARE_KERNELS(baseline)
#if defined(PATHPRUNE_X86)
PP_DECLARE_KERNELS(avx2)
PP_DECLARE_KERNELS(avx512)
#endif
#undef PP_DECLARE_KERNELS

}  // namespace pathprune
