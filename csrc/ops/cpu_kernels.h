// The CPU kernels: what they take, and the tables of them that each instruction set fills in. A
// kernel does one block of a grid (sweep.h) on the calling thread, and allocates nothing.

#pragma once

#include <cstdint>

#include "core/isa.h"
#include "core/weight_map.h"
#include "ops/sweep.h"
#include "ops/through_flow.h"
#include "ops/weights.h"

namespace pathprune {

// In the flows that kernels read, pitch = 16 * words, and what lies behind the columns is zero. In
// those they sum, positions are 1 or a multiple of kPositionsAtOnce; those added to make up the
// multiple are zero.

// y = (f(w) . mask) x, as sums over the tiles of a block.
template <typename A>
struct RowFlow {
  WeightMap f;
  const A* x;  // [groups, positions, pitch]
  int64_t positions, pitch;
  double* sums;  // [tile_blocks, groups, positions, rows]
};

// Its transpose, as sums over the rows of a block.
template <typename A>
struct ColumnFlow {
  WeightMap f;
  const A* g;  // [groups, positions, rows]
  int64_t positions, pitch;
  A* sums;  // [row_blocks, groups, positions, pitch]
};

// Where the scores inside a bracket go, in any order.
template <typename A>
struct Collection {
  Bracket<A> bracket;
  A* values;  // [capacity]
  int64_t capacity;
  int64_t* found;  // how many there are; threads add to it
};

struct CollectCounts {
  int64_t above, not_finite, live;
  double least, largest;  // of the scores inside
};

// Which scores are looked for one by one: at_least <= v < below.
template <typename A>
struct Span {
  A at_least, below;
};

template <typename A>
struct PathFlowKernels {
  void (*by_rows)(const Weights&, const Block&, const RowFlow<A>&);
  void (*by_columns)(const Weights&, const Block&, const ColumnFlow<A>&);
  // Both passes of a pruning round, each in one read of the weights.
  CollectCounts (*collect_by_columns)(const Weights&, const Block&, const ScoreFlows<A>&,
                                      const Collection<A>&, const ColumnFlow<A>&);
  void (*prune_by_rows)(const Weights&, const Block&, const ScoreFlows<A>&, const Stay<A>&,
                        uint16_t* mask, const RowFlow<A>&);
  // total[i] = the sum of blocks[b * stride + i] over b < count, for i < size.
  void (*add_row_blocks)(const double* blocks, int64_t count, int64_t stride, int64_t size,
                         A* total);
  void (*add_column_blocks)(const A* blocks, int64_t count, int64_t stride, int64_t size, A* total);
};

template <typename A>
struct ThroughFlowKernels {
  void (*write)(const Weights&, const Block&, const ScoreFlows<A>&, A* scores);
  CollectCounts (*collect)(const Weights&, const Block&, const ScoreFlows<A>&,
                           const Collection<A>&);
  // Adds the finite live scores of every stride-th word, and counts the others in counts[2] =
  // (live, not finite).
  void (*histogram)(const Weights&, const Block&, const ScoreFlows<A>&, int64_t stride,
                    int64_t* bins, int64_t* counts);
  void (*prune)(const Weights&, const Block&, const ScoreFlows<A>&, const Stay<A>&, uint16_t* mask);
  int64_t (*count)(const Weights&, const Block&, const ScoreFlows<A>&, const Span<A>&);
  // The flat index of the n-th in a block of flat_grid that has more than n.
  int64_t (*nth)(const Weights&, const Block&, const ScoreFlows<A>&, const Span<A>&, int64_t n);
};

struct MaskKernels {
  // One row each.
  void (*pack)(const uint8_t* bools, int64_t columns, uint16_t* words);
  void (*unpack)(const uint16_t* words, int64_t columns, uint8_t* bools);
  int64_t (*count)(const uint16_t* words, int64_t count);
  // Writes the live values of a row, `flat_row` of all, to `values`.
  void (*compact)(const Weights&, int64_t flat_row, void* values);
};

PP_IN_EVERY_ISA(template <typename A> PathFlowKernels<A> path_flow_kernels();
                template <typename A> ThroughFlowKernels<A> through_flow_kernels();
                MaskKernels mask_kernels();)

}  // namespace pathprune
