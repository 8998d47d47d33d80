// Products with sparse weights.
//
// A warp takes a row. For few positions its lanes take entries side by side: columns and values are
// read in runs, x from wherever the columns are, which for few positions is in L1 or L2. For many
// positions the lanes take positions: 32 entries are read at once and handed round by shuffles, and
// of x a column's positions lie side by side. Sums are formed in an order that the pattern and the
// shapes alone decide.

#include "ops/sparse_cuda.h"
#include "ops/tile_weights_cuda.h"
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

// Writes `stored` out to `dense`, with zeros elsewhere; or gathers `stored` from `dense`. T has the
// size of the values.
template <typename T, bool kWritesOut>
__global__ void __launch_bounds__(kThreads, 1)
    move_entries(const Pattern w, const bool vectors, T* stored, T* dense) {
  const int lane = lane_of_thread();
  const Weights weights = {nullptr,  {},     nullptr,   w.layout, w.row_start,
                           w.groups, w.rows, w.columns, w.words};
  for (int64_t flat = warp_of_grid(); flat < w.groups * w.rows; flat += warps_of_grid()) {
    T* const row = dense + flat * w.columns;
    int64_t start = w.row_start[flat];
    for (int64_t tile = 0; tile < tiles_of_row(w.words); ++tile) {
      const uint32_t word = word_of_lane(w.layout, weights, flat, tile, lane);
      int total;
      const int before = warp_sum_before(__popc(word), lane, &total);
#pragma unroll
      for (int i = 0; i < kLaneColumns; i += kVector<T>) {
        uint32_t rest;
        const int rank = rank_of_column<kVector<T>>(word, before, lane, i, &rest);
        T* const first = stored + start + rank;
        const int64_t column = tile * kTileColumns + lane_column(kVector<T>, lane, i);
        Vector<T> vector{};
#pragma unroll
        for (int e = 0; e < kVector<T>; ++e) {
          T* const entry = first + __popc(bits_before(rest, e));
          if (!(rest >> e & 1)) continue;
          if constexpr (kWritesOut) {
            vector.item[e] = *entry;
          } else {
            *entry = row[column + e];
          }
        }
        if constexpr (kWritesOut) {
          if (vectors) {
            if (column < w.columns) *reinterpret_cast<Vector<T>*>(row + column) = vector;
          } else {
#pragma unroll
            for (int e = 0; e < kVector<T>; ++e) {
              if (column + e < w.columns) row[column + e] = vector.item[e];
            }
          }
        }
      }
      start += total;
    }
  }
}

template <bool kWritesOut>
cudaError_t launch_move(const Pattern& w, Storage storage, void* stored, void* dense,
                        cudaStream_t stream) {
  const auto run = [&]<typename T>(T) {
    return launch(move_entries<T, kWritesOut>, blocks_for(w.groups * w.rows, kWarps), kThreads,
                  stream, w, has_vectors<T>(dense, w.columns), static_cast<T*>(stored),
                  static_cast<T*>(dense));
  };
  return storage == Storage::kFloat64   ? run(uint64_t())
         : storage == Storage::kFloat32 ? run(uint32_t())
                                        : run(uint16_t());
}

}  // namespace

cudaError_t write_entries_out(const Pattern& w, Storage storage, const void* values, void* dense,
                              cudaStream_t stream) {
  return launch_move<true>(w, storage, const_cast<void*>(values), dense, stream);
}

cudaError_t gather_entries(const Pattern& w, Storage storage, const void* dense, void* values,
                           cudaStream_t stream) {
  return launch_move<false>(w, storage, values, const_cast<void*>(dense), stream);
}

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
