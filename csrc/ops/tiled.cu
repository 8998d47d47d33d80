// Products with masked weights, computed dense.
//
// A block takes a tile of 128 outputs by some positions, and of the depth a part. Step by step it
// brings a tile of the weight to shared memory, expanded from its bits, and one of the flow; both
// lie there twice, so that one barrier a step will do. Sums of parts are added up by a second
// kernel, in their order.

#include "ops/masked_tile_cuda.h"
#include "ops/tiled_cuda.h"
#include "ops/warp_cuda.h"

namespace pathprune::cuda {
namespace {

template <typename W, int kWidth, int kDepth, bool kIsTransposed>
__global__ void __launch_bounds__(kThreads, 2)
    multiply(const MaskedRows<W> weight, const Matrix<W> flow, const int64_t parts,
             const Sums<W> sums) {
  using Operands = Product<W, kWidth, kDepth, kIsTransposed, false>;
  using Weight = typename Operands::A;
  __shared__ Weight of_weight[2];
  __shared__ typename Operands::B of_flow[2];
  const MaskedWeight& w = weight.w;
  const int64_t outputs = kIsTransposed ? w.columns : w.rows;
  const int64_t positions = flow.rows, steps = ceil_divide(flow.columns, kDepth);
  const int64_t wide = ceil_divide(positions, kWidth), high = ceil_divide(outputs, kTileRows);
  for (int64_t job = blockIdx.x; job < wide * high * parts * w.groups; job += gridDim.x) {
    const int64_t first = job % wide * kWidth, output = job / wide % high * kTileRows;
    const int64_t part = job / (wide * high) % parts, group = job / (wide * high * parts);
    const Matrix<W> x = flow.of_group(group);
    const int64_t end = steps * (part + 1) / parts;
    Operands product;
    MaskedTile<W, Weight::kRows, Weight::kColumns> tile;
    const auto bring = [&](int64_t step, int turn) {
      const int64_t depth = step * kDepth;
      tile.read(weight, group, kIsTransposed ? depth : output, kIsTransposed ? output : depth);
      copy_tile(x, first, depth, &of_flow[turn]);
    };
    int64_t step = steps * part / parts;
    if (step < end) bring(step, 0);
    for (int turn = 0; step < end; turn ^= 1) {
      tile.write(&of_weight[turn]);
      wait_for_copies();
      __syncthreads();
      if (++step < end) bring(step, turn ^ 1);
      product.add(&of_weight[turn], &of_flow[turn]);
    }
    product.for_each([&](int m, int n, float sum) {
      if (output + m >= outputs || first + n >= positions) return;
      sums.put(part, (group * positions + first + n) * outputs + output + m, sum);
    });
    __syncthreads();  // others may still read what the next job would overwrite
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
  const int64_t jobs = ceil_divide(x.rows, kWidth) * ceil_divide(outputs, kTileRows) * parts;
  return launch(transposed ? multiply<W, kWidth, kDepth, true> : multiply<W, kWidth, kDepth, false>,
                blocks_of_grid(jobs * w.groups), kThreads, stream, masked_rows<W>(w), x, parts,
                sums);
}

}  // namespace

cudaError_t multiply_tiled(const MaskedWeight& w, bool transposed, const void* x, int64_t positions,
                           int64_t parts, float* of_parts, void* y, cudaStream_t stream) {
  return by_tiled_storage(w.storage, [&]<typename W>() {
    const int64_t outputs = transposed ? w.columns : w.rows;
    const Matrix<W> flow = matrix<W>(x, positions, transposed ? w.rows : w.columns);
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
