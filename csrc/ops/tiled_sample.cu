// The gradient of a masked weight, computed dense and stored where the mask is one.
//
// A block takes a tile of 128 rows by some columns and sums it over the positions, or a part of
// them, as csrc/ops/tiled.cu does. Then every thread puts its sums where the bits say.

#include "ops/masked_tile_cuda.h"
#include "ops/tiled_cuda.h"
#include "ops/warp_cuda.h"

namespace pathprune::cuda {
namespace {

// Of the words of a tile: their bits, and which entry the first of each is.
template <int kWidth>
struct TileWords {
  uint16_t bits[kTileRows][kWidth / kWordBits];
  int32_t start[kTileRows][kWidth / kWordBits];
};

template <typename W, int kWidth>
__device__ __forceinline__ void read_words(const MaskedRows<W>& from, int64_t group, int64_t row,
                                           int64_t column, TileWords<kWidth>* words) {
  constexpr int kWordsOfRow = kWidth / kWordBits;
#pragma unroll 1
  for (int i = static_cast<int>(threadIdx.x); i < kTileRows * kWordsOfRow; i += kThreads) {
    const int m = i / kWordsOfRow, n = i % kWordsOfRow;
    const int64_t c = column / kWordBits + n;
    const uint32_t bits = from.word(group, row + m, c);
    words->bits[m][n] = static_cast<uint16_t>(bits);
    if (bits != 0 && from.w.tile_start != nullptr) {
      words->start[m][n] = static_cast<int32_t>(from.start_of_word(group, row + m, c));
    }
  }
}

template <typename W, int kWidth, int kDepth>
__global__ void __launch_bounds__(kThreads, 2)
    sample(const MaskedRows<W> weight, const Matrix<W> flow, const Matrix<W> grad,
           const int64_t parts, const Sums<W> sums) {
  using Operands = Product<W, kWidth, kDepth, true, true>;
  __shared__ typename Operands::A of_grad[2];
  __shared__ typename Operands::B of_flow[2];
  __shared__ TileWords<kWidth> words;
  const MaskedWeight& w = weight.w;
  const int64_t steps = ceil_divide(flow.rows, kDepth);
  const int64_t wide = ceil_divide(w.columns, kWidth), high = ceil_divide(w.rows, kTileRows);
  for (int64_t job = blockIdx.x; job < wide * high * parts * w.groups; job += gridDim.x) {
    const int64_t column = job % wide * kWidth, row = job / wide % high * kTileRows;
    const int64_t part = job / (wide * high) % parts, group = job / (wide * high * parts);
    const Matrix<W> x = flow.of_group(group), g = grad.of_group(group);
    const int64_t end = steps * (part + 1) / parts;
    Operands product;
    const auto bring = [&](int64_t step, int turn) {
      copy_tile(g, step * kDepth, row, &of_grad[turn]);
      copy_tile(x, step * kDepth, column, &of_flow[turn]);
    };
    read_words(weight, group, row, column, &words);
    int64_t step = steps * part / parts;
    if (step < end) bring(step, 0);
    for (int turn = 0; step < end; turn ^= 1) {
      wait_for_copies();
      __syncthreads();
      if (++step < end) bring(step, turn ^ 1);
      product.add(&of_grad[turn], &of_flow[turn]);
    }
    __syncthreads();  // where there are no steps
    product.for_each([&](int m, int n, float sum) {
      const uint32_t bits = words.bits[m][n / kWordBits];
      const bool is_entry = bits >> (n % kWordBits) & 1;
      if (w.tile_start != nullptr) {
        if (!is_entry) return;
        const int before = __popc(bits_before(bits, n % kWordBits));
        sums.put(part, int64_t{words.start[m][n / kWordBits]} + before, sum);
      } else if (row + m < w.rows && column + n < w.columns) {
        sums.put(part, (group * w.rows + row + m) * w.columns + column + n, is_entry ? sum : 0);
      }
    });
    __syncthreads();  // others may still read what the next job would overwrite
  }
}

}  // namespace

cudaError_t sample_tiled(const MaskedWeight& w, const void* x, const void* g, int64_t positions,
                         int64_t parts, int64_t count, float* of_parts, void* sums,
                         cudaStream_t stream) {
  return by_tiled_storage(w.storage, [&]<typename W>() {
    constexpr TileShape kShape = kSampleTile<W>;
    const int64_t jobs =
        w.groups * parts * ceil_divide(w.rows, kTileRows) * ceil_divide(w.columns, kShape.width);
    const Sums<W> made = {static_cast<W*>(sums), of_parts, count};
    return launch(sample<W, kShape.width, kShape.depth>, blocks_of_grid(jobs), kThreads, stream,
                  masked_rows<W>(w), matrix<W>(x, positions, w.columns),
                  matrix<W>(g, positions, w.rows), parts, made);
  });
}

}  // namespace pathprune::cuda
