// Products with sparse weights.
//
// A warp takes a row. For few positions its lanes take entries side by side: columns and values are
// read in runs, x from wherever the columns are, which for few positions is in L1 or L2. For many
// positions the lanes take positions: 32 entries are read at once and handed round by shuffles, and
// of x a column's positions lie side by side. Sums are formed in an order that the pattern and the
// shapes alone decide.

#include "ops/sparse_cuda.h"
#include "ops/warp_cuda.h"

namespace pathprune::cuda {
namespace {

constexpr int kFewAtOnce = 4;   // positions whose sums a lane holds
constexpr int kManyAtOnce = 2;  // times 32 positions

template <typename W>
__device__ __forceinline__ Accumulate<W> value_of(const Pattern& w, const W* values, WeightMap f,
                                                  int64_t i) {
  return map_weight(f, widen(values[w.order ? w.order[i] : i]));
}

template <typename W>
__global__ void __launch_bounds__(kThreads, 1)
    multiply_few(const Pattern w, const W* values, const WeightMap f, const Accumulate<W>* x,
                 const int64_t positions, Accumulate<W>* y) {
  using A = Accumulate<W>;
  const int lane = lane_of_thread();
  const int64_t rows = w.groups * w.rows;
  for (int64_t flat = warp_of_grid(); flat < rows; flat += int64_t{gridDim.x} * kWarps) {
    const int64_t group = flat / w.rows, row = flat % w.rows;
    const int64_t begin = w.row_start[flat], end = w.row_start[flat + 1];
    for (int64_t t = 0; t < positions; t += kFewAtOnce) {
      A sum[kFewAtOnce] = {};
      for (int64_t i = begin + lane; i < end; i += kLanes) {
        const A value = value_of(w, values, f, i);
        const A* from = x + (group * positions + t) * w.columns + w.index[i];
#pragma unroll
        for (int p = 0; p < kFewAtOnce; ++p) {
          if (t + p < positions) sum[p] += value * from[p * w.columns];
        }
      }
#pragma unroll
      for (int p = 0; p < kFewAtOnce; ++p) {
        const A total = warp_sum(sum[p]);
        if (lane == 0 && t + p < positions) y[(group * positions + t + p) * w.rows + row] = total;
      }
    }
  }
}

template <typename W>
__global__ void __launch_bounds__(kThreads, 1)
    multiply_many(const Pattern w, const W* values, const WeightMap f, const Accumulate<W>* x,
                  const int64_t positions, Accumulate<W>* y) {
  using A = Accumulate<W>;
  constexpr int kPositions = kManyAtOnce * kLanes;
  const int lane = lane_of_thread();
  const int64_t panels = ceil_divide(positions, kPositions), rows = w.groups * w.rows;
  // The warps of a block take rows of one panel, whose part of x they share.
  for (int64_t job = warp_of_grid(); job < rows * panels; job += int64_t{gridDim.x} * kWarps) {
    const int64_t flat = job % rows, first = job / rows * kPositions + lane;
    const A* from = x + flat / w.rows * w.columns * positions;
    const int64_t end = w.row_start[flat + 1];
    A sum[kManyAtOnce] = {};
    for (int64_t i = w.row_start[flat]; i < end; i += kLanes) {
      const bool is_entry = i + lane < end;
      const int column = is_entry ? w.index[i + lane] : 0;
      const A value = is_entry ? value_of(w, values, f, i + lane) : A(0);
      const int count = end - i < kLanes ? static_cast<int>(end - i) : kLanes;
      for (int k = 0; k < count; ++k) {
        const int64_t c = __shfl_sync(kAllLanes, column, k);
        const A v = __shfl_sync(kAllLanes, value, k);
#pragma unroll
        for (int p = 0; p < kManyAtOnce; ++p) {
          const int64_t t = first + p * kLanes;
          if (t < positions) sum[p] += v * from[c * positions + t];
        }
      }
    }
#pragma unroll
    for (int p = 0; p < kManyAtOnce; ++p) {
      const int64_t t = first + p * kLanes;
      if (t < positions) y[flat * positions + t] = sum[p];
    }
  }
}

template <typename A>
__global__ void __launch_bounds__(kThreads, 1)
    sample(const Pattern w, const A* x, const A* g, const int64_t positions, A* sums) {
  const int lane = lane_of_thread();
  const int64_t rows = w.groups * w.rows;
  for (int64_t flat = warp_of_grid(); flat < rows; flat += int64_t{gridDim.x} * kWarps) {
    const A* at = g + flat * positions;
    const A* from = x + flat / w.rows * w.columns * positions;
    for (int64_t i = w.row_start[flat]; i < w.row_start[flat + 1]; ++i) {
      const A* column = from + w.index[i] * positions;
      A sum = 0;
      for (int64_t t = lane; t < positions; t += kLanes) sum += at[t] * column[t];
      const A total = warp_sum(sum);
      if (lane == 0) sums[i] = total;
    }
  }
}

}  // namespace

cudaError_t multiply_entries(const Pattern& w, const void* values, Storage storage, WeightMap f,
                             const void* x, int64_t positions, void* y, cudaStream_t stream) {
  if (positions == 0) return cudaSuccess;
  return by_storage(storage, false, [&]<typename W, bool kPacked>() {
    using A = Accumulate<W>;
    const bool is_many = positions >= kManyPositions;
    const int64_t panels = is_many ? ceil_divide(positions, kManyAtOnce * kLanes) : 1;
    const int64_t blocks = blocks_for(w.groups * w.rows * panels, kWarps);
    return launch(is_many ? multiply_many<W> : multiply_few<W>, blocks, kThreads, stream, w,
                  static_cast<const W*>(values), f, static_cast<const A*>(x), positions,
                  static_cast<A*>(y));
  });
}

cudaError_t sample_entries(const Pattern& w, bool is_double, const void* x, const void* g,
                           int64_t positions, void* sums, cudaStream_t stream) {
  const int64_t blocks = blocks_for(w.groups * w.rows, kWarps);
  const auto run = [&]<typename A>(A) {
    return launch(sample<A>, blocks, kThreads, stream, w, static_cast<const A*>(x),
                  static_cast<const A*>(g), positions, static_cast<A*>(sums));
  };
  return is_double ? run(double()) : run(float());
}

}  // namespace pathprune::cuda
