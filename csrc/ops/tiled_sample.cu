// The gradient of a masked weight, computed dense and stored where the mask is one.
//
// A block takes a tile of 128 rows by some columns and sums it over the positions, or a part of
// them, as csrc/ops/tiled.cu does. Then every thread puts its sums where the bits say.

#include "ops/tile_product_cuda.h"
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

template <int kWidth>
__device__ __forceinline__ void read_words(const MaskedWeight& w, int group, int row, int column,
                                           TileWords<kWidth>* words) {
  constexpr int kWordsOfRow = kWidth / kWordBits;
#pragma unroll 1
  for (int i = static_cast<int>(threadIdx.x); i < kTileRows * kWordsOfRow; i += kThreads) {
    const int m = i / kWordsOfRow, n = i % kWordsOfRow;
    const int64_t c = column / kWordBits + n, flat = group * w.rows + row + m;
    const bool is_there = row + m < w.rows && c < w.words;
    const uint16_t* word = w.layout + flat * w.words + c;
    words->bits[m][n] =
        is_there ? static_cast<uint16_t>(*word & columns_in_word(w.columns, c)) : uint16_t{0};
    if (!is_there || w.tile_start == nullptr) continue;
    int start = w.tile_start[flat * w.stretches + c / kStretchWords];
    for (int64_t before = 1; before <= c % kStretchWords; ++before)
      start += __popc(*(word - before));
    words->start[m][n] = start;
  }
}

template <typename W, int kWidth, int kDepth>
__global__ void __launch_bounds__(kThreads, 2)
    sample(const MaskedWeight w, const Matrix<W> flow, const Matrix<W> grad, const int parts,
           const int jobs, const Sums<W> sums) {
  using Operands = Product<W, kWidth, kDepth, true, true>;
  __shared__ typename Operands::A of_grad[2];
  __shared__ typename Operands::B of_flow[2];
  __shared__ TileWords<kWidth> words;
  const int columns = static_cast<int>(w.columns), rows = static_cast<int>(w.rows);
  const int wide = tiles_of(columns, kWidth), high = tiles_of(rows, kTileRows);
  const int steps = tiles_of(flow.rows, kDepth);
  for (int job = static_cast<int>(blockIdx.x); job < jobs; job += static_cast<int>(gridDim.x)) {
    const int of_rows = job / wide, of_parts = of_rows / high, group = of_parts / parts;
    const int column = job % wide * kWidth, row = of_rows % high * kTileRows;
    const int part = of_parts % parts, end = begin_of_part(steps, parts, part + 1);
    const int begin = begin_of_part(steps, parts, part);
    Operands product;
    read_words(w, group, row, column, &words);
    for (int step = begin - 1; step < end; ++step) {
      const int turn = step & 1;
      wait_for_copies();
      __syncthreads();
      if (step + 1 < end) {
        const int depth = (step + 1) * kDepth;
        copy_tile(grad, group, depth, row, &of_grad[turn ^ 1]);
        copy_tile(flow, group, depth, column, &of_flow[turn ^ 1]);
      }
      if (step >= begin) product.add(&of_grad[turn], &of_flow[turn]);
    }
    product.for_each([&](int m, int n, float sum) {
      const uint32_t bits = words.bits[m][n / kWordBits];
      const bool is_entry = bits >> (n % kWordBits) & 1;
      if (w.tile_start != nullptr) {
        if (!is_entry) return;
        const int before = __popc(bits_before(bits, n % kWordBits));
        sums.put(part, int64_t{words.start[m][n / kWordBits]} + before, sum);
      } else if (row + m < rows && column + n < columns) {
        sums.put(part, (group * w.rows + row + m) * w.columns + column + n, is_entry ? sum : 0);
      }
    });
    __syncthreads();  // others may still read what the next job would overwrite
  }
}

}  // namespace

cudaError_t sample_tiled(const MaskedWeight& w, const Sampled& of, int64_t parts, int64_t count,
                         float* of_parts, void* sums, cudaStream_t stream) {
  return by_tiled_storage(w.storage, [&]<typename W>() {
    constexpr TileShape kShape = kSampleTile<W>;
    const int64_t tiles = ceil_divide(w.rows, kTileRows) * ceil_divide(w.columns, kShape.width);
    const int64_t jobs = tiles * parts * w.groups;
    if (jobs > kMostCounted) return cudaErrorInvalidValue;
    const Sums<W> made = {static_cast<W*>(sums), of_parts, count};
    const auto flow = [&](const void* first, int64_t columns) {
      return Matrix<W>{static_cast<const W*>(first), static_cast<int>(of.positions),
                       static_cast<int>(columns)};
    };
    return launch(sample<W, kShape.width, kShape.depth>, jobs, kThreads, stream, w,
                  flow(of.x, of.x_columns), flow(of.g, of.g_columns), static_cast<int>(parts),
                  static_cast<int>(jobs), made);
  });
}

}  // namespace pathprune::cuda
