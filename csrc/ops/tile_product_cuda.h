// A product of two tiles in shared memory, summed in the registers of a block. For .cu files.
//
// A tile of the sums is 128 x kColumns. Its 8 warps lie 4 x 2 over it; 16-bit numbers go through
// the tensor cores, 32 x kColumns / 2 a warp, and float32 through fused multiply-adds, 8 x
// kColumns / 16 a thread, so that float32 stays float32.

#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "ops/mma_cuda.h"
#include "ops/tile_weights_cuda.h"
#include "ops/tiled.h"
#include "ops/warp_cuda.h"

namespace pathprune::cuda {

// [kRows, kColumns] in shared memory, in vectors of 16 bytes. A row's vectors are moved about, so
// that eight rows' vectors of one column lie in different banks.
template <typename W, int kRows_, int kColumns_>
struct alignas(128) SharedTile {
  static constexpr int kRows = kRows_, kColumns = kColumns_, kVectors = kColumns / kVector<W>;
  static_assert(kVectors >= 4 && (kVectors & (kVectors - 1)) == 0);

  Vector<W> vector[kRows * kVectors];

  // Where a column is, in bytes.
  static __device__ __forceinline__ uint32_t offset(int row, int column) {
    const int turn = kVectors >= 8 ? row % 8 : row / (8 / kVectors) % kVectors;
    const int of_row = column * static_cast<int>(sizeof(W)) ^ turn * kVectorBytes;
    return static_cast<uint32_t>(row * kVectors * kVectorBytes + of_row);
  }
  // The vector that begins at a column, a multiple of kVector<W>.
  __device__ __forceinline__ Vector<W>* at(int row, int column) {
    return reinterpret_cast<Vector<W>*>(reinterpret_cast<char*>(this) + offset(row, column));
  }
};

// A matrix in global memory, of which tiles are read: every row is made of whole vectors.
template <typename W>
struct Matrix {
  const W* first;  // [groups, rows, columns]
  int rows, columns;

  __device__ __forceinline__ const W* at(int group, int row, int column) const {
    return first + (static_cast<int64_t>(group) * rows + row) * columns + column;
  }
};

// Has all threads of the block copy a tile, zeros where the matrix ends, without waiting for it.
template <typename W, int kRows, int kColumns>
__device__ __forceinline__ void copy_tile(const Matrix<W>& from, int group, int first_row,
                                          int first_column, SharedTile<W, kRows, kColumns>* to) {
  constexpr int kVectors = SharedTile<W, kRows, kColumns>::kVectors;
  constexpr int kRowsAtOnce = kThreads / kVectors;
  static_assert(kRows % kRowsAtOnce == 0);
  const int row = static_cast<int>(threadIdx.x) / kVectors;
  const int column = static_cast<int>(threadIdx.x) % kVectors * kVector<W>;
  // Rows from this thread's first on; none where there is no column.
  const int rows = first_column + column < from.columns ? from.rows - first_row - row : 0;
  const W* place = from.at(group, first_row + row, first_column + column);
#pragma unroll
  for (int i = 0; i < kRows; i += kRowsAtOnce, place += kRowsAtOnce * from.columns) {
    const bool is_there = i < rows;
    copy_without_waiting(to->at(row + i, column), is_there ? place : from.first, is_there);
  }
}

// sums[m, n] += sum_k a[m, k] b[n, k] for tiles a [128, kDepth] and b [kColumns, kDepth]; either
// may be given with k along its rows.
template <typename W, int kColumns, int kDepth, bool kIsTurnedA, bool kIsTurnedB>
class Product;

template <typename W, int kLong, int kDepth, bool kIsTurned>
using Operand =
    std::conditional_t<kIsTurned, SharedTile<W, kDepth, kLong>, SharedTile<W, kLong, kDepth>>;

template <typename W, int kColumns, int kDepth, bool kIsTurnedA, bool kIsTurnedB>
  requires(sizeof(W) == 2)
class Product<W, kColumns, kDepth, kIsTurnedA, kIsTurnedB> {
 public:
  using A = Operand<W, kTileRows, kDepth, kIsTurnedA>;
  using B = Operand<W, kColumns, kDepth, kIsTurnedB>;

  __device__ __forceinline__ void add(A* a, B* b) {
#pragma unroll
    for (int k = 0; k < kDepth; k += 16) {
      uint32_t of_a[kHigh][4];
#pragma unroll
      for (int i = 0; i < kHigh; ++i) load<kIsTurnedA, false>(a, first_row() + 16 * i, k, of_a[i]);
#pragma unroll
      for (int j = 0; j < kWide; j += 2) {
        uint32_t of_b[4];
        load<kIsTurnedB, true>(b, first_column() + 8 * j, k, of_b);
#pragma unroll
        for (int i = 0; i < kHigh; ++i) {
          multiply_fragments<W>(of_a[i], of_b[0], of_b[1], sums_[i][j]);
          multiply_fragments<W>(of_a[i], of_b[2], of_b[3], sums_[i][j + 1]);
        }
      }
    }
  }

  // Calls take(m, n, sum) for each sum of this thread.
  template <typename Take>
  __device__ __forceinline__ void for_each(const Take& take) const {
    const int row = first_row() + lane_of_thread() / 4;
    const int column = first_column() + lane_of_thread() % 4 * 2;
#pragma unroll
    for (int i = 0; i < kHigh; ++i) {
#pragma unroll
      for (int j = 0; j < kWide; ++j) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          take(row + 16 * i + e / 2 * 8, column + 8 * j + e % 2, sums_[i][j][e]);
        }
      }
    }
  }

 private:
  // Fragments 16 x 8 of a warp's sums, and of these two side by side.
  static constexpr int kHigh = 2, kWide = kColumns / 16;
  static_assert(kWide % 2 == 0);

  static __device__ __forceinline__ int first_row() { return warp_of_block() / 2 * 32; }
  static __device__ __forceinline__ int first_column() { return warp_of_block() % 2 * 8 * kWide; }

  // The four 8 x 8 parts of what begins at (along, k), 16 along and 16 deep: the second of them is
  // the next 8 along, or, where depth goes first, the next 8 deep.
  template <bool kIsTurned, bool kDepthFirst, typename Tile>
  static __device__ __forceinline__ void load(Tile* tile, int along, int k, uint32_t (&to)[4]) {
    const int lane = lane_of_thread(), part = lane / 8;
    const int deep = kDepthFirst ? part % 2 : part / 2, far = kDepthFirst ? part / 2 : part % 2;
    const char* first = reinterpret_cast<const char*>(tile);
    if constexpr (kIsTurned) {
      constexpr int kRowBytes = Tile::kColumns * static_cast<int>(sizeof(W));
      load_transposed_fragments(
          first + Tile::offset(8 * deep + lane % 8, along + 8 * far) + k * kRowBytes, to);
    } else {
      // k is a multiple of the 16 that (along, 8 deep) lies in, so bits of the two do not meet.
      const uint32_t place = Tile::offset(along + 8 * far + lane % 8, 8 * deep);
      load_fragments(first + (place ^ k * sizeof(W)), to);
    }
  }

  float sums_[kHigh][kWide][4] = {};
};

template <int kColumns, int kDepth, bool kIsTurnedA, bool kIsTurnedB>
class Product<float, kColumns, kDepth, kIsTurnedA, kIsTurnedB> {
 public:
  using A = Operand<float, kTileRows, kDepth, kIsTurnedA>;
  using B = Operand<float, kColumns, kDepth, kIsTurnedB>;

  __device__ __forceinline__ void add(A* a, B* b) {
#pragma unroll 1
    for (int k = 0; k < kDepth; k += kStep) {
      float of_a[kHigh][kStep];
      load<kIsTurnedA>(a, row_of_threads(), 0, k, of_a);
#pragma unroll
      for (int j = 0; j < kWide; j += kAtOnce) {
        float of_b[kAtOnce][kStep];
        load<kIsTurnedB>(b, column_of_threads(), j, k, of_b);
#pragma unroll
        for (int e = 0; e < kStep; ++e) {
#pragma unroll
          for (int i = 0; i < kHigh; ++i) {
#pragma unroll
            for (int n = 0; n < kAtOnce; ++n) sums_[i][j + n] += of_a[i][e] * of_b[n][e];
          }
        }
      }
    }
  }

  template <typename Take>
  __device__ __forceinline__ void for_each(const Take& take) const {
#pragma unroll
    for (int i = 0; i < kHigh; ++i) {
#pragma unroll
      for (int j = 0; j < kWide; ++j) {
        take(place<kIsTurnedA>(row_of_threads(), i), place<kIsTurnedB>(column_of_threads(), j),
             sums_[i][j]);
      }
    }
  }

 private:
  // The threads lie 16 x 16 over the sums; kStep of the depth are in a vector.
  static constexpr int kSide = 16, kStep = kVector<float>;
  static constexpr int kHigh = kTileRows / kSide, kWide = kColumns / kSide;
  static constexpr int kAtOnce = kIsTurnedB ? kStep : 1;  // columns
  static_assert(kWide % kAtOnce == 0);

  static __device__ __forceinline__ int row_of_threads() {
    return static_cast<int>(threadIdx.x) / kSide;
  }
  static __device__ __forceinline__ int column_of_threads() {
    return static_cast<int>(threadIdx.x) % kSide;
  }

  // Where the i-th row, or column, of a thread is: such that a vector holds several of its own.
  template <bool kIsTurned>
  static __device__ __forceinline__ int place(int thread, int i) {
    return kIsTurned ? (i / kStep * kSide + thread) * kStep + i % kStep : i * kSide + thread;
  }

  // Of the rows, or columns, of a thread those from `first` on.
  template <bool kIsTurned, typename Tile, int kCount>
  static __device__ __forceinline__ void load(Tile* tile, int thread, int first, int k,
                                              float (&to)[kCount][kStep]) {
    if constexpr (kIsTurned) {
#pragma unroll
      for (int e = 0; e < kStep; ++e) {
#pragma unroll
        for (int i = 0; i < kCount; i += kStep) {
          const Vector<float> vector = *tile->at(k + e, place<true>(thread, first + i));
#pragma unroll
          for (int n = 0; n < kStep; ++n) to[i + n][e] = vector.item[n];
        }
      }
    } else {
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        // kSide rows further down vectors are turned alike.
        constexpr uint32_t kApart = kSide * Tile::kColumns * sizeof(float);
        const uint32_t place = Tile::offset(thread, k) + (first + i) * kApart;
        const auto vector =
            *reinterpret_cast<const Vector<float>*>(reinterpret_cast<const char*>(tile) + place);
#pragma unroll
        for (int e = 0; e < kStep; ++e) to[i][e] = vector.item[e];
      }
    }
  }

  float sums_[kHigh][kWide] = {};
};

// Where sums go.
template <typename W>
struct Sums {
  W* made;       // [count], where there is one part
  float* parts;  // [parts, count], where there are several
  int64_t count;

  __device__ __forceinline__ void put(int64_t part, int64_t place, float sum) const {
    if (parts != nullptr) {
      parts[part * count + place] = sum;
    } else {
      made[place] = rounded<W>(sum);
    }
  }
};

}  // namespace pathprune::cuda
