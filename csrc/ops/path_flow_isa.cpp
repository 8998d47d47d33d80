// Flow along one layer of weights, compiled for each instruction set.

#include "ops/lane_flow.h"
#include "ops/lane_score.h"

namespace pathprune::PATHPRUNE_ISA {
namespace {

template <typename A>
void by_rows(const Weights& w, const Block& block, const RowFlow<A>& flow) {
  if (flow.positions == 1) {
    RowFlowVisitor<A, 1> visitor(w, block, flow);
    sweep<A>(w, block, visitor);
  } else {
    RowFlowVisitor<A, kPositionsAtOnce> visitor(w, block, flow);
    sweep<A>(w, block, visitor);
  }
}

template <typename A>
void clear_sums(const Weights& w, const Block& block, const ColumnFlow<A>& flow) {
  const int64_t begin = block.tile_begin * kTileColumns;
  const int64_t end = std::min(flow.pitch, block.tile_end * kTileColumns);
  const int64_t first = (block.row_block * w.groups + block.group) * flow.positions;
  for (int64_t t = 0; t < flow.positions; ++t) {
    std::memset(flow.sums + (first + t) * flow.pitch + begin, 0, (end - begin) * sizeof(A));
  }
}

template <typename A>
void by_columns(const Weights& w, const Block& block, const ColumnFlow<A>& flow) {
  clear_sums(w, block, flow);
  if (flow.positions == 1) {
    ColumnFlowVisitor<A, 1> visitor(w, block, flow);
    sweep<A>(w, block, visitor);
  } else {
    ColumnFlowVisitor<A, kPositionsAtOnce> visitor(w, block, flow);
    sweep<A>(w, block, visitor);
  }
}

// ---- two passes in one read --------------------------------------------------------------------

// One position, where both passes take the same weights from registers; of one map, f(w) g too.
template <typename A, typename FlowMap, typename ScoreMap>
class CollectByColumns {
 public:
  static constexpr bool kShared = !std::is_same_v<FlowMap, AnyMap<A>>;

  CollectByColumns(const Weights& w, const Block& block, const ScoreFlows<A>& flows,
                   const Collection<A>& collection, const ColumnFlow<A>& flow)
      : flow_(w, block, flow), collect_(w, block, flows, collection) {}

  PP_INLINE int passes() const { return 1; }
  PP_INLINE void enter(const Tile& tile, int pass) {
    flow_.enter(tile, pass);
    collect_.enter(tile, pass);
  }
  CollectCounts counts() { return collect_.counts(); }

  template <int kRows>
  class Strip {
   public:
    PP_INLINE Strip(CollectByColumns& visitor, const Tile& tile, int first)
        : flow_(visitor.flow_, tile, first), collect_(visitor.collect_, tile, first) {}

    PP_INLINE void operator()(int word, const Lanes<A> (&w)[kRows], const Bits (&live)[kRows]) {
      const Mapped<A, kRows> fg = flow_.weigh(0, flow_.map(w));
      collect_.take(word, kShared ? fg : collect_.weigh(w), live);
      flow_.add(0, word, fg, live);
    }

    PP_INLINE void finish() { collect_.finish(); }

   private:
    typename ColumnFlowVisitor<A, 1, FlowMap>::template Strip<kRows> flow_;
    typename CollectVisitor<A, ScoreMap>::template Strip<kRows> collect_;
  };

 private:
  ColumnFlowVisitor<A, 1, FlowMap> flow_;
  CollectVisitor<A, ScoreMap> collect_;
};

template <typename A, typename Map>
CollectCounts collect_at_once(const Weights& w, const Block& block, const ScoreFlows<A>& flows,
                              const Collection<A>& collection, const ColumnFlow<A>& flow) {
  CollectByColumns<A, Map, Map> visitor(w, block, flows, collection, flow);
  sweep<A>(w, block, visitor);
  return visitor.counts();
}

template <typename A>
CollectCounts collect_by_columns(const Weights& w, const Block& block, const ScoreFlows<A>& flows,
                                 const Collection<A>& collection, const ColumnFlow<A>& flow) {
  clear_sums(w, block, flow);
  if (flow.positions != 1) {
    CollectVisitor<A> collect(w, block, flows, collection);
    ColumnFlowVisitor<A, kPositionsAtOnce> columns(w, block, flow);
    sweep<A>(w, block, collect, columns);
    return collect.counts();
  }
  if constexpr (sweeping::kSideBySide<A>) {
    if (flow.f == flows.s && flow.f == WeightMap::kAbs) {
      return collect_at_once<A, OneMap<A, WeightMap::kAbs>>(w, block, flows, collection, flow);
    }
    if (flow.f == flows.s && flow.f == WeightMap::kSquare) {
      return collect_at_once<A, OneMap<A, WeightMap::kSquare>>(w, block, flows, collection, flow);
    }
  }
  return collect_at_once<A, AnyMap<A>>(w, block, flows, collection, flow);
}

template <typename A, typename FlowMap, typename ScoreMap>
class PruneByRows {
 public:
  static constexpr bool kShared = !std::is_same_v<FlowMap, AnyMap<A>>;

  PruneByRows(const Weights& w, const Block& block, const ScoreFlows<A>& flows, const Stay<A>& stay,
              uint16_t* mask, const RowFlow<A>& flow)
      : prune_(w, block, flows, stay, mask), flow_(w, block, flow) {}

  PP_INLINE int passes() const { return 1; }
  PP_INLINE void enter(const Tile& tile, int pass) {
    prune_.enter(tile, pass);
    flow_.enter(tile, pass);
  }

  template <int kRows>
  class Strip {
   public:
    PP_INLINE Strip(PruneByRows& visitor, const Tile& tile, int first)
        : prune_(visitor.prune_, tile, first), flow_(visitor.flow_, tile, first) {}

    PP_INLINE void operator()(int word, const Lanes<A> (&w)[kRows], const Bits (&live)[kRows]) {
      const Mapped<A, kRows> f = flow_.map(w);
      Bits stays[kRows];
      prune_.take(word, kShared ? f : prune_.map(w), live, stays);
      flow_.take(word, f, stays);
    }

    PP_INLINE void finish() { flow_.finish(); }

   private:
    typename PruneVisitor<A, ScoreMap>::template Strip<kRows> prune_;
    typename RowFlowVisitor<A, 1, FlowMap>::template Strip<kRows> flow_;
  };

 private:
  PruneVisitor<A, ScoreMap> prune_;
  RowFlowVisitor<A, 1, FlowMap> flow_;
};

template <typename A, typename Map>
void prune_at_once(const Weights& w, const Block& block, const ScoreFlows<A>& flows,
                   const Stay<A>& stay, uint16_t* mask, const RowFlow<A>& flow) {
  PruneByRows<A, Map, Map> visitor(w, block, flows, stay, mask, flow);
  sweep<A>(w, block, visitor);
}

template <typename A>
void prune_by_rows(const Weights& w, const Block& block, const ScoreFlows<A>& flows,
                   const Stay<A>& stay, uint16_t* mask, const RowFlow<A>& flow) {
  if (flow.positions != 1) {
    PruneVisitor<A> prune(w, block, flows, stay, mask);
    RowFlowVisitor<A, kPositionsAtOnce> rows(w, block, flow);
    return sweep<A>(w, block, prune, rows);
  }
  if constexpr (sweeping::kSideBySide<A>) {
    if (flow.f == flows.s && flow.f == WeightMap::kAbs) {
      return prune_at_once<A, OneMap<A, WeightMap::kAbs>>(w, block, flows, stay, mask, flow);
    }
    if (flow.f == flows.s && flow.f == WeightMap::kSquare) {
      return prune_at_once<A, OneMap<A, WeightMap::kSquare>>(w, block, flows, stay, mask, flow);
    }
  }
  prune_at_once<A, AnyMap<A>>(w, block, flows, stay, mask, flow);
}

template <typename From, typename A>
void add_blocks(const From* blocks, int64_t count, int64_t stride, int64_t size, A* total) {
  constexpr int kAtOnce = 512;
  double sums[kAtOnce];
  for (int64_t begin = 0; begin < size; begin += kAtOnce) {
    const int64_t here = std::min<int64_t>(kAtOnce, size - begin);
    std::memset(sums, 0, sizeof(sums));
    for (int64_t b = 0; b < count; ++b) {
      const From* block = blocks + b * stride + begin;
      for (int64_t i = 0; i < here; ++i) sums[i] += block[i];
    }
    for (int64_t i = 0; i < here; ++i) total[begin + i] = static_cast<A>(sums[i]);
  }
}

}  // namespace

template <typename A>
PathFlowKernels<A> path_flow_kernels() {
  return {by_rows<A>,       by_columns<A>,         collect_by_columns<A>,
          prune_by_rows<A>, add_blocks<double, A>, add_blocks<A, A>};
}
template PathFlowKernels<float> path_flow_kernels<float>();
template PathFlowKernels<double> path_flow_kernels<double>();

}  // namespace pathprune::PATHPRUNE_ISA
