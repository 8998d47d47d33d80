// What the CPU ops share: threads over blocks, and tensors in the shapes that the kernels read.

#pragma once

#include <algorithm>
#include <limits>
#include <mutex>
#include <tuple>

#include "glue/arguments.h"
#include "ops/cpu_kernels.h"

namespace pathprune {

// Calls visit(block) for every block of the grid, on torch's threads.
template <typename Visit>
void for_each_block(const Grid& grid, const Visit& visit) {
  torch::stable::parallel_for(0, grid.size(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) visit(grid[i]);
  });
}

template <typename T>
T* data_of(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

// Calls function(A()), A being the type of the flows and scores of the weights.
template <typename Function>
auto by_accumulate(const WeightArguments& weight, const Function& function) {
  return weight.is_double() ? function(double()) : function(float());
}

// Where a row of a flow ends for the kernels, which read whole words.
inline int64_t pitch_of(const Weights& w) { return w.words * kWordColumns; }

// [groups, T, units] -> [groups, positions, width], with zeros where there was nothing.
Tensor padded_flow(const Tensor& flow, int64_t positions, int64_t width);

// The flows of a score as the kernels read them, for as long as this lives.
template <typename A>
class ScoreFlowTensors {
 public:
  ScoreFlowTensors(const Weights& w, const ScoreArguments& score) : g_(score.g) {
    const bool has_flows = score.x.has_value();
    const int64_t positions = has_flows ? score.x->size(1) : 0;
    if (has_flows) x_ = padded_flow(*score.x, positions, pitch_of(w));
    view_ = {score.s, has_flows, data_or_null<A>(x_), data_or_null<A>(g_), positions, pitch_of(w)};
  }

  const ScoreFlows<A>& view() const { return view_; }

 private:
  OptionalTensor x_, g_;
  ScoreFlows<A> view_;
};

// What is collected, and the tensors that it is returned in.
template <typename A>
class CollectionTensors {
 public:
  CollectionTensors(const Tensor& weight, ScalarType type, double lo, double hi, int64_t capacity)
      : values_(new_tensor(weight, {capacity}, type)),
        counts_(new_tensor(weight, {4}, ScalarType::Long)),
        extremes_(new_tensor(weight, {2}, ScalarType::Double)) {
    const Bracket<A> bracket = {static_cast<A>(lo), static_cast<A>(hi)};
    view_ = {bracket, data_of<A>(values_), capacity, &found_};
  }
  CollectionTensors(const CollectionTensors&) = delete;

  const Collection<A>& view() const { return view_; }

  // Calls collect(block) for the counts of every block of the grid.
  template <typename Collect>
  void add_blocks(const Grid& grid, const Collect& collect) {
    torch::stable::parallel_for(0, grid.size(), 1, [&](int64_t begin, int64_t end) {
      CollectCounts counts = no_counts();
      for (int64_t i = begin; i < end; ++i) counts = sum(counts, collect(grid[i]));
      const std::lock_guard<std::mutex> lock(mutex_);
      total_ = sum(total_, counts);
    });
  }

  // (values [capacity] A, counts int64 [4], extremes float64 [2])
  std::tuple<Tensor, Tensor, Tensor> results() const {
    const int64_t counts[] = {total_.above, found_, total_.not_finite, total_.live};
    std::copy_n(counts, 4, data_of<int64_t>(counts_));
    data_of<double>(extremes_)[0] = total_.least;
    data_of<double>(extremes_)[1] = total_.largest;
    return {values_, counts_, extremes_};
  }

 private:
  static CollectCounts no_counts() {
    constexpr double kInfinity = std::numeric_limits<double>::infinity();
    return {0, 0, 0, kInfinity, -kInfinity};
  }

  static CollectCounts sum(const CollectCounts& a, const CollectCounts& b) {
    return {a.above + b.above, a.not_finite + b.not_finite, a.live + b.live,
            std::min(a.least, b.least), std::max(a.largest, b.largest)};
  }

  Tensor values_, counts_, extremes_;
  Collection<A> view_;
  std::mutex mutex_;
  CollectCounts total_ = no_counts();
  int64_t found_ = 0;
};

}  // namespace pathprune
