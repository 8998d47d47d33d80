// The through-flow ops on the CPU.

#include "ops/through_flow.h"

#include <algorithm>
#include <numeric>

#include "glue/cpu.h"
#include "glue/cpu_ops.h"

namespace pathprune {
namespace {

// Histograms that are filled side by side may take so much memory together.
constexpr int64_t kHistogramBytes = int64_t{32} << 20;

Tensor write_scores(const WeightArguments& arguments, const ScoreArguments& score) {
  const Weights& w = arguments.view();
  const Tensor scores =
      new_tensor(arguments.values(), {w.groups, w.rows, w.columns}, arguments.accumulate());
  by_accumulate(arguments, [&]<typename A>(A) {
    const auto kernels = PP_BY_ISA(through_flow_kernels<A>)();
    const ScoreFlowTensors<A> flows(w, score);
    for_each_block(row_grid(w), [&](const Block& block) {
      kernels.write(w, block, flows.view(), data_of<A>(scores));
    });
  });
  return scores;
}

template <typename A>
void fill_histogram(const Weights& w, const ScoreFlows<A>& flows, int64_t stride,
                    const Tensor& histogram, const Tensor& counts) {
  const auto kernels = PP_BY_ISA(through_flow_kernels<A>)();
  const Grid grid = row_grid(w);
  const int64_t bins = histogram.size(0);
  const int64_t room = kHistogramBytes / static_cast<int64_t>(bins * sizeof(int64_t));
  const int64_t workers = std::min<int64_t>(
      {room, torch::stable::get_num_threads(), std::max<int64_t>(1, grid.size())});
  const int64_t width = bins + 2;
  const Tensor parts = torch::stable::new_zeros(histogram, {workers, width});
  torch::stable::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
    for (int64_t worker = begin; worker < end; ++worker) {
      int64_t* part = data_of<int64_t>(parts) + worker * width;
      const int64_t last = grid.size() * (worker + 1) / workers;
      for (int64_t i = grid.size() * worker / workers; i < last; ++i) {
        kernels.histogram(w, grid[i], flows, stride, part, part + bins);
      }
    }
  });
  for (int64_t worker = 0; worker < workers; ++worker) {
    const int64_t* part = data_of<int64_t>(parts) + worker * width;
    int64_t* total = data_of<int64_t>(histogram);
    for (int64_t bin = 0; bin < bins; ++bin) total[bin] += part[bin];
    data_of<int64_t>(counts)[0] += part[bins];
    data_of<int64_t>(counts)[1] += part[bins + 1];
  }
}

template <typename A>
int64_t find_nth(const Weights& w, const ScoreFlows<A>& flows, const Span<A>& span, int64_t n,
                 int64_t* counts,  // [grid.size()]
                 const Grid& grid) {
  constexpr int64_t kAtOnce = 32;  // blocks counted before it is asked whether they are enough
  const auto kernels = PP_BY_ISA(through_flow_kernels<A>)();
  for (int64_t first = 0; first < grid.size(); first += kAtOnce) {
    const int64_t last = std::min(first + kAtOnce, grid.size());
    torch::stable::parallel_for(first, last, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) counts[i] = kernels.count(w, grid[i], flows, span);
    });
    for (int64_t i = first; i < last; ++i) {
      if (n < counts[i]) return kernels.nth(w, grid[i], flows, span, n);
      n -= counts[i];
    }
  }
  return w.groups * w.rows * w.columns;
}

}  // namespace

Tensor through_flow(const Tensor& weight, const OptionalTensor& mask, const OptionalTensor& x,
                    const OptionalTensor& g, int64_t s, const OptionalTensor& layout,
                    const OptionalTensor& row_start, int64_t columns) {
  const char* op = "through_flow";
  const WeightArguments arguments(op, weight, mask, layout, row_start, columns);
  return write_scores(arguments, ScoreArguments(op, arguments, x, g, s));
}

Tensor masked_weight(const Tensor& weight, const OptionalTensor& mask, int64_t f) {
  const char* op = "masked_weight";
  const int64_t columns = weight.dim() == 3 ? weight.size(2) : 0;
  const WeightArguments arguments(op, weight, mask, std::nullopt, std::nullopt, columns);
  check_map(op, "f", f);
  return write_scores(arguments, ScoreArguments(op, arguments, std::nullopt, std::nullopt, f));
}

std::tuple<Tensor, Tensor, Tensor> through_flow_collect(
    const Tensor& weight, const OptionalTensor& mask, const OptionalTensor& x,
    const OptionalTensor& g, int64_t s, double lo, double hi, int64_t capacity,
    const OptionalTensor& layout, const OptionalTensor& row_start, int64_t columns) {
  const char* op = "through_flow_collect";
  const WeightArguments arguments(op, weight, mask, layout, row_start, columns);
  const Weights& w = arguments.view();
  const ScoreArguments score(op, arguments, x, g, s);
  check_not_nan(op, "lo", lo);
  check_not_nan(op, "hi", hi);
  check_at_least(op, "capacity", capacity, 0);
  return by_accumulate(arguments, [&]<typename A>(A) {
    const auto kernels = PP_BY_ISA(through_flow_kernels<A>)();
    const ScoreFlowTensors<A> flows(w, score);
    CollectionTensors<A> collection(weight, arguments.accumulate(), lo, hi, capacity);
    const auto collect = [&](const Weights& part) {
      collection.add_blocks(row_grid(part), [&](const Block& block) {
        return kernels.collect(part, block, flows.view(), collection.view());
      });
    };
    if (!score.x && !w.layout && w.groups * w.rows == 1) {
      for (const Weights& part : cut_row(w)) collect(part);
    } else {
      collect(w);
    }
    return collection.results();
  });
}

std::tuple<Tensor, Tensor> through_flow_histogram(const Tensor& weight, const OptionalTensor& mask,
                                                  const OptionalTensor& x, const OptionalTensor& g,
                                                  int64_t s, int64_t stride,
                                                  const OptionalTensor& layout,
                                                  const OptionalTensor& row_start,
                                                  int64_t columns) {
  const char* op = "through_flow_histogram";
  const WeightArguments arguments(op, weight, mask, layout, row_start, columns);
  const ScoreArguments score(op, arguments, x, g, s);
  check_at_least(op, "stride", stride, 1);
  return by_accumulate(arguments, [&]<typename A>(A) {
    const int64_t bins = int64_t{1} << FloatTraits<A>::kBinBits;
    const Tensor histogram = torch::stable::new_zeros(arguments.values(), {bins}, ScalarType::Long);
    const Tensor counts = torch::stable::new_zeros(arguments.values(), {2}, ScalarType::Long);
    const ScoreFlowTensors<A> flows(arguments.view(), score);
    fill_histogram(arguments.view(), flows.view(), stride, histogram, counts);
    return std::make_tuple(histogram, counts);
  });
}

void through_flow_prune_(const Tensor& weight, const Tensor& mask, const OptionalTensor& x,
                         const OptionalTensor& g, int64_t s, double at_least, double above,
                         int64_t cut, const OptionalTensor& layout, const OptionalTensor& row_start,
                         int64_t columns) {
  const char* op = "through_flow_prune_";
  const WeightArguments arguments(op, weight, mask, layout, row_start, columns);
  const Weights& w = arguments.view();
  const ScoreArguments score(op, arguments, x, g, s);
  check_not_nan(op, "at_least", at_least);
  check_not_nan(op, "above", above);
  uint16_t* written = check_written(op, mask);
  by_accumulate(arguments, [&]<typename A>(A) {
    const auto kernels = PP_BY_ISA(through_flow_kernels<A>)();
    const ScoreFlowTensors<A> flows(w, score);
    const Stay<A> stay = {static_cast<A>(at_least), static_cast<A>(above), cut};
    for_each_block(row_grid(w), [&](const Block& block) {
      kernels.prune(w, block, flows.view(), stay, written);
    });
  });
}

Tensor through_flow_nth(const Tensor& weight, const OptionalTensor& mask, const OptionalTensor& x,
                        const OptionalTensor& g, int64_t s, double at_least, double above,
                        int64_t n, const OptionalTensor& layout, const OptionalTensor& row_start,
                        int64_t columns) {
  const char* op = "through_flow_nth";
  const WeightArguments arguments(op, weight, mask, layout, row_start, columns);
  const Weights& w = arguments.view();
  const ScoreArguments score(op, arguments, x, g, s);
  check_not_nan(op, "at_least", at_least);
  check_not_nan(op, "above", above);
  check_at_least(op, "n", n, 0);
  const Tensor index = new_tensor(arguments.values(), {}, ScalarType::Long);
  const Grid grid = flat_grid(w);
  const Tensor counts = new_tensor(arguments.values(), {grid.size()}, ScalarType::Long);
  by_accumulate(arguments, [&]<typename A>(A) {
    const ScoreFlowTensors<A> flows(w, score);
    const Span<A> span = {static_cast<A>(at_least), static_cast<A>(above)};
    *data_of<int64_t>(index) = find_nth(w, flows.view(), span, n, data_of<int64_t>(counts), grid);
  });
  return index;
}

}  // namespace pathprune
