// Products with masked weights, computed dense.
//
// A block takes a tile of 128 outputs by some positions, and of the depth a part. Step by step it
// brings a tile of the weight to shared memory, with its zeros written out, and one of the flow;
// those of the next step are on their way, the weight's in registers, while it multiplies. Sums of
// parts are added up by a second kernel, in their order, so that results are the same on every run.

#include "ops/masked_tile_cuda.h"
#include "ops/tiled_cuda.h"
#include "ops/warp_cuda.h"

namespace pathprune::cuda {
namespace {

template <typename W, int kWidth, int kDepth, bool kIsTransposed, bool kIsPacked>
__global__ void __launch_bounds__(kThreads, 2)
    multiply(const MaskedWeight w, const Matrix<W> flow, const int parts, const int jobs,
             const Sums<W> sums) {
  using Operands = Product<W, kWidth, kDepth, kIsTransposed, false>;
  using Weight = typename Operands::A;
  __shared__ Weight of_weight;
  __shared__ typename Operands::B of_flow[2];
  const int outputs = static_cast<int>(kIsTransposed ? w.columns : w.rows), positions = flow.rows;
  const int wide = tiles_of(positions, kWidth), high = tiles_of(outputs, kTileRows);
  const int steps = tiles_of(flow.columns, kDepth);
  for (int job = static_cast<int>(blockIdx.x); job < jobs; job += static_cast<int>(gridDim.x)) {
    const int of_outputs = job / wide, of_parts = of_outputs / high, group = of_parts / parts;
    const int first = job % wide * kWidth, output = of_outputs % high * kTileRows;
    const int part = of_parts % parts, end = begin_of_part(steps, parts, part + 1);
    const int begin = begin_of_part(steps, parts, part);
    Operands product;
    MaskedTile<W, Weight::kRows, Weight::kColumns, kIsPacked> tile;
    for (int step = begin - 1; step < end; ++step) {
      const int turn = step & 1, depth = step * kDepth, next = depth + kDepth;
      if (step >= begin) {
        tile.write(w, group, kIsTransposed ? depth : output, kIsTransposed ? output : depth,
                   &of_weight);
        wait_for_copies();
      }
      __syncthreads();
      if (step + 1 < end) {
        tile.read(w, group, kIsTransposed ? next : output, kIsTransposed ? output : next);
        copy_tile(flow, group, first, next, &of_flow[turn ^ 1]);
      }
      if (step >= begin) product.add(&of_weight, &of_flow[turn]);
      __syncthreads();
    }
    product.for_each([&](int m, int n, float sum) {
      if (output + m >= outputs || first + n >= positions) return;
      const int64_t position = int64_t{group} * positions + first + n;
      sums.put(part, position * outputs + output + m, sum);
    });
  }
}

template <typename W>
__global__ void __launch_bounds__(kThreads, 2)
    add(const float* of_parts, const int64_t parts, const int64_t count, W* made) {
  for (int64_t i = thread_of_grid(); i < count; i += threads_of_grid()) {
    float sum = of_parts[i];
    for (int64_t part = 1; part < parts; ++part) sum += of_parts[part * count + i];
    made[i] = rounded<W>(sum);
  }
}

template <typename W, int kWidth, int kDepth>
cudaError_t launch_multiply(const MaskedWeight& w, bool transposed, const Matrix<W>& x,
                            int64_t parts, const Sums<W>& sums, cudaStream_t stream) {
  const int64_t outputs = transposed ? w.columns : w.rows;
  const int64_t tiles = ceil_divide(x.rows, kWidth) * ceil_divide(outputs, kTileRows);
  const int64_t jobs = tiles * parts * w.groups;
  if (jobs > kMostCounted) return cudaErrorInvalidValue;
  const auto run = [&]<bool kIsTransposed, bool kIsPacked>() {
    return launch(multiply<W, kWidth, kDepth, kIsTransposed, kIsPacked>, jobs, kThreads, stream, w,
                  x, static_cast<int>(parts), static_cast<int>(jobs), sums);
  };
  if (w.tile_start != nullptr) {
    return transposed ? run.template operator()<true, true>()
                      : run.template operator()<false, true>();
  }
  return transposed ? run.template operator()<true, false>()
                    : run.template operator()<false, false>();
}

}  // namespace

cudaError_t multiply_tiled(const MaskedWeight& w, bool transposed, const void* x, int64_t positions,
                           int64_t depth, int64_t parts, float* of_parts, void* y,
                           cudaStream_t stream) {
  return by_tiled_storage(w.storage, [&]<typename W>() {
    const int64_t outputs = transposed ? w.columns : w.rows;
    const Matrix<W> flow = {static_cast<const W*>(x), static_cast<int>(positions),
                            static_cast<int>(depth)};
    const Sums<W> sums = {static_cast<W*>(y), of_parts, w.groups * positions * outputs};
    constexpr TileShape kNarrowShape = kNarrowTile<W>, kWideShape = kWideTile<W>;
    return positions <= kNarrow ? launch_multiply<W, kNarrowShape.width, kNarrowShape.depth>(
                                      w, transposed, flow, parts, sums, stream)
                                : launch_multiply<W, kWideShape.width, kWideShape.depth>(
                                      w, transposed, flow, parts, sums, stream);
  });
}

cudaError_t add_parts(Storage storage, const float* of_parts, int64_t parts, int64_t count,
                      void* made, cudaStream_t stream) {
  return by_tiled_storage(storage, [&]<typename W>() {
    return launch(add<W>, blocks_for(count, kThreads), kThreads, stream, of_parts, parts, count,
                  static_cast<W*>(made));
  });
}

}  // namespace pathprune::cuda
