// Packing: where the rows, and their tiles, of what a mask leaves begin, and moving it there.
//
// Bytes: the mask twice or three times (it is small enough for L2 up to 400 million weights), the
// live values read once and written once.

#include <cub/device/device_scan.cuh>

#include "ops/kernels_cuda.h"
#include "ops/tile_weights_cuda.h"

namespace pathprune::cuda {
namespace {

constexpr int kPadding = 16;  // values behind the last, so that a vector may be read anywhere

__device__ __forceinline__ int tile_count(const uint16_t* words, int64_t columns,
                                          int64_t words_of_row, int64_t flat_row, int64_t tile,
                                          int lane) {
  Weights w{};
  w.columns = columns;
  w.words = words_of_row;
  return warp_sum(__popc(word_of_lane(words, w, flat_row, tile, lane)));
}

// A warp a row: where each of its tiles begins.
__global__ void __launch_bounds__(kThreads)
    start_tiles(const uint16_t* words, const int64_t* row_start, const int64_t rows,
                const int64_t columns, const int64_t words_of_row, const int64_t tiles,
                int64_t* tile_start) {  // [rows, tiles]
  const int lane = lane_of_thread();
  for (int64_t row = warp_of_grid(); row < rows; row += warps_of_grid()) {
    int64_t start = row_start[row];
    for (int64_t tile = 0; tile < tiles; ++tile) {
      if (lane == 0) tile_start[row * tiles + tile] = start;
      start += tile_count(words, columns, words_of_row, row, tile, lane);
    }
  }
}

// A warp a row: how many bits are set in it; 0 after the last row.
__global__ void __launch_bounds__(kThreads)
    count_rows(const uint16_t* words, const int64_t rows, const int64_t columns,
               const int64_t words_of_row, const int64_t tiles,
               int64_t* counts) {  // [rows + 1]
  const int lane = lane_of_thread();
  for (int64_t row = warp_of_grid(); row <= rows; row += warps_of_grid()) {
    int64_t count = 0;
    for (int64_t tile = 0; row < rows && tile < tiles; ++tile) {
      count += tile_count(words, columns, words_of_row, row, tile, lane);
    }
    if (lane == 0) counts[row] = count;
  }
}

// A warp a tile: neighbouring lanes write neighbouring values.
template <typename W, bool kPacked>
__global__ void __launch_bounds__(kThreads)
    move_tiles(const TiledWeights w, const int64_t* tile_start,  // [rows, tiles] of the result
               const int64_t live, W* values) {                  // [live + kPadding]
  const int lane = lane_of_thread();
  for (int64_t n = warp_of_grid(); n < w.flat_rows() * w.tiles; n += warps_of_grid()) {
    const int64_t flat_row = n / w.tiles, tile = n % w.tiles;
    const uint32_t word = word_of_lane(w.all.mask, w.all, flat_row, tile, lane);
    W value[kLaneColumns];
    const uint32_t bits = load_tile<W, kPacked>(w, flat_row, tile, lane, word, value);
    const int before = bits_before_lane(word, lane);
#pragma unroll
    for (int i = 0; i < kLaneColumns; i += kVector<W>) {
      uint32_t rest;
      const int rank = rank_of_column<kVector<W>>(word, before, lane, i, &rest);
      W* const first = values + tile_start[n] + rank;
#pragma unroll
      for (int e = 0; e < kVector<W>; ++e) {
        if (bits >> (i + e) & 1) first[__popc(bits_before(rest, e))] = value[i + e];
      }
    }
  }
  if (thread_of_grid() < kPadding) values[live + thread_of_grid()] = W{};
}

}  // namespace

int64_t tile_start_count(int64_t flat_rows, int64_t words) {
  const int64_t tiles = tiles_of_row(words);
  return tiles > 1 ? flat_rows * tiles : 0;
}

cudaError_t fill_tile_starts(const uint16_t* words, const int64_t* row_start, int64_t flat_rows,
                             int64_t columns, int64_t words_of_row, int64_t* tile_start,
                             cudaStream_t stream) {
  return launch(start_tiles, blocks_for(flat_rows, kWarps), kThreads, stream, words, row_start,
                flat_rows, columns, words_of_row, tiles_of_row(words_of_row), tile_start);
}

cudaError_t row_start_bytes(int64_t flat_rows, size_t* bytes) {
  *bytes = 0;
  int64_t* const none = nullptr;
  return cub::DeviceScan::ExclusiveSum(nullptr, *bytes, none, none, flat_rows + 1);
}

cudaError_t fill_row_starts(const uint16_t* words, int64_t flat_rows, int64_t columns,
                            int64_t words_of_row, void* workspace, size_t bytes, int64_t* row_start,
                            cudaStream_t stream) {
  const cudaError_t error =
      launch(count_rows, blocks_for(flat_rows + 1, kWarps), kThreads, stream, words, flat_rows,
             columns, words_of_row, tiles_of_row(words_of_row), row_start);
  if (error != cudaSuccess) return error;
  return cub::DeviceScan::ExclusiveSum(workspace, bytes, row_start, row_start, flat_rows + 1,
                                       stream);
}

cudaError_t compact(const StoredWeights& stored, const int64_t* tile_start, int64_t live,
                    void* values, cudaStream_t stream) {
  return by_storage(stored.all.storage, stored.packed(), [&]<typename W, bool kPacked>() {
    const TiledWeights w = tiled<W>(stored);
    const int64_t tiles = w.flat_rows() * w.tiles;
    return launch(move_tiles<W, kPacked>, blocks_for(tiles > 0 ? tiles : 1, kWarps), kThreads,
                  stream, w, tile_start, live, static_cast<W*>(values));
  });
}

}  // namespace pathprune::cuda
