// Scores and what is decided by them, compiled for each instruction set.

#include "ops/lane_score.h"

namespace pathprune::PATHPRUNE_ISA {
namespace {

template <typename A>
void write(const Weights& w, const Block& block, const ScoreFlows<A>& flows, A* scores) {
  WriteVisitor<A> visitor(w, block, flows, scores);
  sweep<A>(w, block, visitor);
}

template <typename A>
CollectCounts collect(const Weights& w, const Block& block, const ScoreFlows<A>& flows,
                      const Collection<A>& collection) {
  CollectVisitor<A> visitor(w, block, flows, collection);
  sweep<A>(w, block, visitor);
  return visitor.counts();
}

template <typename A>
void prune(const Weights& w, const Block& block, const ScoreFlows<A>& flows, const Stay<A>& stay,
           uint16_t* mask) {
  PruneVisitor<A> visitor(w, block, flows, stay, mask);
  sweep<A>(w, block, visitor);
}

template <typename A>
int64_t count(const Weights& w, const Block& block, const ScoreFlows<A>& flows,
              const Span<A>& span) {
  CountVisitor<A> visitor(w, block, flows, span);
  sweep<A>(w, block, visitor);
  return visitor.count();
}

// ---- word by word, where few words are visited --------------------------------------------------

// The `count` weights of a word, of which those of `layout` lie at `stored` and behind.
template <typename A>
Lanes<A> weights_at(const Weights& w, int64_t stored, Bits layout, int64_t count) {
  A lane[kLanes] = {};
  if (w.layout) count = __builtin_popcount(layout);
  if constexpr (sizeof(A) == sizeof(double)) {
    std::memcpy(lane, static_cast<const double*>(w.values) + stored, count * sizeof(A));
  } else if (w.storage == Storage::kFloat32) {
    std::memcpy(lane, static_cast<const float*>(w.values) + stored, count * sizeof(A));
  } else {
    widen_values(w, stored, count, lane);
  }
  return w.layout ? expand(layout, lane) : load(lane);
}

// The scores of one word of a row, made of mapped weights.
template <typename A>
Lanes<A> scores_at(const Weights& w, const ScoreFlows<A>& flows, int64_t group, int64_t row,
                   int64_t word, const Lanes<A>& s) {
  if (!flows.has_flows) return s;
  const A* x = flows.x + group * flows.positions * flows.pitch + kWordColumns * word;
  const A* g = flows.g + group * flows.positions * w.rows + row;
  if (flows.positions == 1) return through_flow(s, load(x), broadcast(*g));
  Lanes<A> total = {};
  for (int64_t t = 0; t < flows.positions; ++t) {
    total = add_pair(total, load(x + t * flows.pitch), broadcast(g[t * w.rows]));
  }
  return times(s, total);
}

// Calls visit(row, word, scores, live) for every stride-th word of the block, in flat order.
template <typename A, typename Visit>
PP_INLINE void visit_every(const Weights& w, const Block& block, const ScoreFlows<A>& flows,
                           int64_t stride, Visit visit) {
  const AnyMap<A> map(flows.s);
  const int64_t first_word = block.tile_begin * kTileWords;
  const int64_t end = std::min(w.words, block.tile_end * kTileWords);
  for (int64_t row = block.row_begin; row < block.row_end; ++row) {
    const int64_t flat_row = block.group * w.rows + row, first = flat_row * w.words;
    const uint16_t* layout = w.layout ? w.layout + first : nullptr;
    int64_t stored = layout ? w.row_start[flat_row] : flat_row * w.columns;
    int64_t passed = 0;  // words of the row that lie before `stored`
    const int64_t before = (first + first_word) % stride;
    for (int64_t word = first_word + (before ? stride - before : 0); word < end; word += stride) {
      stored += layout ? sweeping::count_bits(layout + passed, word - passed)
                       : kWordColumns * (word - passed);
      passed = word;
      const int64_t columns = std::min<int64_t>(kWordColumns, w.columns - kWordColumns * word);
      const Bits live = (w.mask ? w.mask[first + word] : kAllLanes) & first_lanes(columns);
      if (live == 0) continue;
      const Lanes<A> s = map(weights_at<A>(w, stored, layout ? layout[word] : kAllLanes, columns));
      visit(row, word, scores_at(w, flows, block.group, row, word, s), live);
    }
  }
}

template <typename A>
void histogram(const Weights& w, const Block& block, const ScoreFlows<A>& flows, int64_t stride,
               int64_t* bins, int64_t* counts) {
  visit_every(w, block, flows, stride, [&](int64_t, int64_t, const Lanes<A>& v, Bits live) {
    const Bits strange = not_finite(live, v);
    counts[0] += __builtin_popcount(live);
    counts[1] += __builtin_popcount(strange);
    A lane[kLanes];
    store(lane, v);
    for (Bits todo = live & ~strange; todo; todo &= todo - 1) {
      ++bins[float_bin(lane[__builtin_ctz(todo)])];
    }
  });
}

template <typename A>
int64_t nth(const Weights& w, const Block& block, const ScoreFlows<A>& flows, const Span<A>& span,
            int64_t n) {
  const Lanes<A> least = broadcast(span.at_least), below = broadcast(span.below);
  int64_t index = -1;
  visit_every(w, block, flows, 1, [&](int64_t row, int64_t word, const Lanes<A>& v, Bits live) {
    for (Bits todo = more_than(at_least(live, v, least), below, v); todo; todo &= todo - 1) {
      if (n-- != 0) continue;
      const int64_t column = kWordColumns * word + __builtin_ctz(todo);
      index = (block.group * w.rows + row) * w.columns + column;
    }
  });
  return index;
}

}  // namespace

template <typename A>
ThroughFlowKernels<A> through_flow_kernels() {
  return {write<A>, collect<A>, histogram<A>, prune<A>, count<A>, nth<A>};
}
template ThroughFlowKernels<float> through_flow_kernels<float>();
template ThroughFlowKernels<double> through_flow_kernels<double>();

}  // namespace pathprune::PATHPRUNE_ISA
