// What the walk ops take on the CPU, and the table of kernels that each instruction set fills in.

#pragma once

#include <cstdint>

#include "core/isa.h"
#include "ops/walk.h"

namespace pathprune {

PP_HD int64_t eights(int64_t count) { return (count + 7) / 8; }

// How many numbers a row's CDF takes as a tree of eights (ops/lane_cdf.h): on each level whole
// eights.
PP_HD int64_t cdf_room(int64_t count) {
  int64_t room = 8;
  for (; count > 8; count = eights(count)) room += 8 * eights(count);
  return room;
}

// Searches in one CDF that go on at once.
inline constexpr int kWalkBatch = 32;

// Walkers that have chosen a candidate, whose kernels are on their way from memory. They take an
// entry when the next batch has chosen.
struct WalkPending {
  int count = 0;
  uint32_t walker[kWalkBatch];
  int64_t kernel[kWalkBatch];  // where its entries begin
  double mass[kWalkBatch];     // the sum of its weights, or 0 where it is not known
  uint64_t word[kWalkBatch];   // of the entry
};

// Memory for one unit's distribution, allocated by the caller.
struct WalkScratch {
  double* weights;   // [candidates]
  uint64_t* cdf;     // [cdf_room(candidates)]
  void* transposed;  // a tile of columns, each made contiguous with this pitch
  int64_t pitch;     // in values
  WalkPending* pending;
};

struct WalkKernels {
  // Moves the walkers at `unit`, whose numbers are order[0, count), given the unit's own values
  // (with a mass: its own masses) side by side; the last of them when `settle` is called.
  void (*unit)(const WalkMatrix&, const WalkRule&, const Walkers&, const WalkScratch&,
               const void* values, int64_t unit, const uint32_t* order, int64_t count);
  void (*settle)(const WalkMatrix&, const WalkRule&, const Walkers&, const WalkScratch&);
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

PP_IN_EVERY_ISA(WalkKernels walk_kernels();)

}  // namespace pathprune
