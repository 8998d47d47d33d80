// The flow ops on the CPU. Row sums are formed per block of tiles and column sums per block of
// rows; a second, small step adds the blocks up in their order. Packed weights are cut into blocks
// of rows for column sums too, as dense ones: a block of columns would have to find its place in
// every row.

#include <algorithm>

#include "glue/cpu.h"
#include "glue/cpu_ops.h"

namespace pathprune {
namespace {

// How many positions the kernels sum for a flow of so many.
int64_t whole_positions(int64_t positions) {
  if (positions == 1) return 1;
  return (positions + kPositionsAtOnce - 1) / kPositionsAtOnce * kPositionsAtOnce;
}

// y[G, T, O], summed by rows.
template <typename A>
class RowSums {
 public:
  RowSums(const WeightArguments& weight, const Tensor& x, WeightMap f)
      : w_(weight.view()),
        grid_(row_grid(w_)),
        true_positions_(x.size(1)),
        positions_(whole_positions(true_positions_)),
        x_(padded_flow(x, positions_, pitch_of(w_))),
        sums_(new_tensor(x, {grid_.tile_blocks, w_.groups, positions_, w_.rows},
                         ScalarType::Double)) {
    view_ = {f, data_of<A>(x_), positions_, pitch_of(w_), data_of<double>(sums_)};
  }

  const Grid& grid() const { return grid_; }
  const RowFlow<A>& view() const { return view_; }

  Tensor result() const {
    const Tensor y = new_tensor(x_, {w_.groups, true_positions_, w_.rows}, x_.scalar_type());
    const auto kernels = PP_BY_ISA(path_flow_kernels<A>)();
    for (int64_t group = 0; group < w_.groups; ++group) {
      for (int64_t t = 0; t < true_positions_; ++t) {
        kernels.add_row_blocks(view_.sums + (group * positions_ + t) * w_.rows, grid_.tile_blocks,
                               w_.groups * positions_ * w_.rows, w_.rows,
                               data_of<A>(y) + (group * true_positions_ + t) * w_.rows);
      }
    }
    return y;
  }

 private:
  const Weights& w_;
  const Grid grid_;
  const int64_t true_positions_, positions_;
  const Tensor x_, sums_;
  RowFlow<A> view_;
};

// So many positions are summed by columns at once: every block of rows has its own sums for each.
constexpr int64_t kColumnPositions = 32;

// Some positions of y[G, T, K], summed by columns.
template <typename A>
class ColumnSums {
 public:
  ColumnSums(const WeightArguments& weight, const Tensor& g, WeightMap f)
      : w_(weight.view()),
        grid_(column_grid(w_)),
        true_positions_(g.size(1)),
        positions_(whole_positions(true_positions_)),
        pitch_(pitch_of(w_)),
        g_(padded_flow(g, positions_, w_.rows)),
        sums_(new_tensor(g, {grid_.row_blocks, w_.groups, positions_, pitch_}, g.scalar_type())) {
    view_ = {f, data_of<A>(g_), positions_, pitch_, data_of<A>(sums_)};
  }

  const Grid& grid() const { return grid_; }
  const ColumnFlow<A>& view() const { return view_; }

  // Writes the positions of y from `first` on.
  void write(const Tensor& y, int64_t first) const {
    const auto kernels = PP_BY_ISA(path_flow_kernels<A>)();
    const int64_t rows = w_.groups * true_positions_;
    const int64_t work = std::max<int64_t>(1, grid_.row_blocks * w_.columns);
    const int64_t grain = std::max<int64_t>(1, kBlockWeights / work);
    torch::stable::parallel_for(0, rows, grain, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        const int64_t group = row / true_positions_, t = row % true_positions_;
        kernels.add_column_blocks(view_.sums + (group * positions_ + t) * pitch_, grid_.row_blocks,
                                  w_.groups * positions_ * pitch_, w_.columns,
                                  data_of<A>(y) + (group * y.size(1) + first + t) * w_.columns);
      }
    });
  }

 private:
  const Weights& w_;
  const Grid grid_;
  const int64_t true_positions_, positions_, pitch_;
  const Tensor g_, sums_;
  ColumnFlow<A> view_;
};

template <typename A>
void sweep_columns(const Weights& w, const ColumnSums<A>& sums) {
  const auto kernels = PP_BY_ISA(path_flow_kernels<A>)();
  for_each_block(sums.grid(), [&](const Block& b) { kernels.by_columns(w, b, sums.view()); });
}

// y[G, T, K] for g[G, T, O]. first_sweep(sums) fills the sums of the first positions, and may do
// other things with the weights.
template <typename A, typename FirstSweep>
Tensor sum_by_columns(const WeightArguments& weight, Tensor g, WeightMap f,
                      const FirstSweep& first_sweep) {
  const Weights& w = weight.view();
  const int64_t positions = g.size(1);
  const Tensor y = new_tensor(g, {w.groups, positions, w.columns}, g.scalar_type());
  for (int64_t begin = 0; begin == 0 || begin < positions; begin += kColumnPositions) {
    const int64_t count = std::min(kColumnPositions, positions - begin);
    const Tensor part = torch::stable::contiguous(torch::stable::narrow(g, 1, begin, count));
    const ColumnSums<A> sums(weight, part, f);
    if (begin == 0) {
      first_sweep(sums);
    } else {
      sweep_columns(w, sums);
    }
    sums.write(y, begin);
  }
  return y;
}

}  // namespace

Tensor path_flow_linear(const Tensor& weight, const OptionalTensor& mask, const Tensor& x,
                        int64_t f, bool transposed, const OptionalTensor& layout,
                        const OptionalTensor& row_start, int64_t columns) {
  const char* op = "path_flow_linear";
  const WeightArguments arguments(op, weight, mask, layout, row_start, columns);
  const Weights& w = arguments.view();
  const WeightMap map = check_map(op, "f", f);
  const Tensor flow = check_flow(op, "x", x, arguments, transposed ? w.rows : columns);
  return by_accumulate(arguments, [&]<typename A>(A) {
    if (transposed) {
      return sum_by_columns<A>(arguments, flow, map,
                               [&](const ColumnSums<A>& sums) { sweep_columns(w, sums); });
    }
    const auto kernels = PP_BY_ISA(path_flow_kernels<A>)();
    const RowSums<A> sums(arguments, flow, map);
    for_each_block(sums.grid(), [&](const Block& b) { kernels.by_rows(w, b, sums.view()); });
    return sums.result();
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> path_flow_linear_collect(
    const Tensor& weight, const OptionalTensor& mask, const Tensor& x, const Tensor& g, int64_t f,
    int64_t s, double lo, double hi, int64_t capacity, const OptionalTensor& layout,
    const OptionalTensor& row_start, int64_t columns) {
  const char* op = "path_flow_linear_collect";
  const WeightArguments arguments(op, weight, mask, layout, row_start, columns);
  const Weights& w = arguments.view();
  const ScoreArguments score(op, arguments, x, g, s);
  const WeightMap map = check_map(op, "f", f);
  check_not_nan(op, "lo", lo);
  check_not_nan(op, "hi", hi);
  check_at_least(op, "capacity", capacity, 0);
  return by_accumulate(arguments, [&]<typename A>(A) {
    const auto kernels = PP_BY_ISA(path_flow_kernels<A>)();
    const ScoreFlowTensors<A> flows(w, score);
    CollectionTensors<A> collection(weight, arguments.accumulate(), lo, hi, capacity);
    const Tensor y = sum_by_columns<A>(arguments, *score.g, map, [&](const ColumnSums<A>& sums) {
      collection.add_blocks(sums.grid(), [&](const Block& b) {
        return kernels.collect_by_columns(w, b, flows.view(), collection.view(), sums.view());
      });
    });
    return std::tuple_cat(std::make_tuple(y), collection.results());
  });
}

Tensor path_flow_linear_prune_(const Tensor& weight, const Tensor& mask, const Tensor& x_old,
                               const Tensor& g_old, int64_t s, double at_least, double above,
                               int64_t cut, const Tensor& x, int64_t f,
                               const OptionalTensor& layout, const OptionalTensor& row_start,
                               int64_t columns) {
  const char* op = "path_flow_linear_prune_";
  const WeightArguments arguments(op, weight, mask, layout, row_start, columns);
  const Weights& w = arguments.view();
  const ScoreArguments score(op, arguments, x_old, g_old, s, "x_old", "g_old");
  const WeightMap map = check_map(op, "f", f);
  const Tensor flow = check_flow(op, "x", x, arguments, columns);
  check_not_nan(op, "at_least", at_least);
  check_not_nan(op, "above", above);
  uint16_t* written = check_written(op, mask);
  return by_accumulate(arguments, [&]<typename A>(A) {
    const auto kernels = PP_BY_ISA(path_flow_kernels<A>)();
    const ScoreFlowTensors<A> flows(w, score);
    const RowSums<A> sums(arguments, flow, map);
    const Stay<A> stay = {static_cast<A>(at_least), static_cast<A>(above), cut};
    for_each_block(sums.grid(), [&](const Block& b) {
      kernels.prune_by_rows(w, b, flows.view(), stay, written, sums.view());
    });
    return sums.result();
  });
}

}  // namespace pathprune
