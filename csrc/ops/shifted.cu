// Products with shifts of one row.
//
// A block takes a row and a run of positions, two to a thread. Entries of the row are read in runs
// and handed round by shuffles; zeros are skipped by the whole warp. Reads of x are side by side,
// and, from row to row, in L2. Sums are formed entry after entry.

#include "ops/shifted_cuda.h"
#include "ops/warp_cuda.h"

namespace pathprune::cuda {
namespace {

constexpr int kAtOnce = 2;  // positions of a lane

template <typename A>
__global__ void __launch_bounds__(kThreads, 1)
    multiply(const A* w, const int64_t* shift, const int64_t rows, const int64_t columns,
             const A* x, const int64_t numbers, const int64_t length, A* y) {
  constexpr int64_t kPositions = kAtOnce * kLanes;
  const int lane = lane_of_thread();
  const int64_t runs = ceil_divide(length, kPositions);
  for (int64_t i = warp_of_grid(); i < rows * runs; i += int64_t{gridDim.x} * kWarps) {
    const int64_t row = i / runs, first = i % runs * kPositions + lane;
    A sum[kAtOnce] = {};
    for (int64_t k = 0; k < columns; k += kLanes) {
      const bool there = k + lane < columns;
      const A mine = there ? w[row * columns + k + lane] : A(0);
      const int64_t at = there ? shift[k + lane] : 0;
      for (unsigned left = __ballot_sync(kAllLanes, mine != A(0)); left; left &= left - 1) {
        const int from = __ffs(static_cast<int>(left)) - 1;
        const A value = __shfl_sync(kAllLanes, mine, from);
        const int64_t place = __shfl_sync(kAllLanes, at, from) + first;
#pragma unroll
        for (int p = 0; p < kAtOnce; ++p) {
          const int64_t t = place + p * kLanes;
          if (t < numbers && first + p * kLanes < length) sum[p] += value * x[t];
        }
      }
    }
#pragma unroll
    for (int p = 0; p < kAtOnce; ++p) {
      const int64_t t = first + p * kLanes;
      if (t < length) y[row * length + t] = sum[p];
    }
  }
}

}  // namespace

cudaError_t multiply_shifted(bool is_double, const void* w, const int64_t* shift, int64_t rows,
                             int64_t columns, const void* x, int64_t numbers, int64_t length,
                             void* y, cudaStream_t stream) {
  if (rows == 0 || length == 0) return cudaSuccess;
  const int64_t blocks = blocks_for(rows * ceil_divide(length, kAtOnce * kLanes), kWarps);
  const auto run = [&]<typename A>(A) {
    return launch(multiply<A>, blocks, kThreads, stream, static_cast<const A*>(w), shift, rows,
                  columns, static_cast<const A*>(x), numbers, length, static_cast<A*>(y));
  };
  return is_double ? run(double()) : run(float());
}

}  // namespace pathprune::cuda
