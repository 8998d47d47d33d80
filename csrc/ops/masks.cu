// Masks between bools and bits, and how many bits are set.
//
// Bytes: 16 bools and 2 of the word they make, each once. A thread takes one word, as one load or
// store of 16 bytes where rows allow it: the words of a warp are 512 adjacent bytes of bools.

#include "core/bits.h"
#include "ops/kernels_cuda.h"
#include "ops/tile_cuda.h"
#include "ops/warp_cuda.h"

namespace pathprune::cuda {
namespace {

struct alignas(kVectorBytes) Bools {
  uint8_t item[kWordBits];
};

// Whether the bools of every whole word are one vector.
bool has_vectors(const uint8_t* bools, int64_t columns) {
  return reinterpret_cast<uintptr_t>(bools) % kVectorBytes == 0 && columns % kWordBits == 0;
}

__device__ __forceinline__ int columns_of_word(int64_t columns, int64_t c) {
  const int64_t left = columns - c * kWordBits;
  return left < kWordBits ? static_cast<int>(left) : kWordBits;
}

__global__ void __launch_bounds__(kThreads)
    pack(const uint8_t* bools, const int64_t words, const int64_t columns,
         const int64_t words_of_row, const bool vectors, uint16_t* packed) {
  for (int64_t n = thread_of_grid(); n < words; n += threads_of_grid()) {
    const int64_t row = n / words_of_row, c = n % words_of_row;
    const uint8_t* first = bools + row * columns + c * kWordBits;
    if (vectors) {
      const Bools vector = *reinterpret_cast<const Bools*>(first);
      packed[n] = static_cast<uint16_t>(gather_bits(vector.item, kWordBits));
    } else {
      packed[n] = static_cast<uint16_t>(gather_bits(first, columns_of_word(columns, c)));
    }
  }
}

__global__ void __launch_bounds__(kThreads)
    unpack(const uint16_t* packed, const int64_t words, const int64_t columns,
           const int64_t words_of_row, const bool vectors, uint8_t* bools) {
  for (int64_t n = thread_of_grid(); n < words; n += threads_of_grid()) {
    const int64_t row = n / words_of_row, c = n % words_of_row;
    uint8_t* const first = bools + row * columns + c * kWordBits;
    if (vectors) {
      Bools vector;
      scatter_bits(packed[n], kWordBits, vector.item);
      *reinterpret_cast<Bools*>(first) = vector;
    } else {
      scatter_bits(packed[n], columns_of_word(columns, c), first);
    }
  }
}

// Sums of integers are the same in any order, so here an atomic is welcome: one a warp.
__global__ void __launch_bounds__(kThreads)
    count(const uint16_t* words, const int64_t vectors, const int64_t size, int64_t* total) {
  int64_t mine = 0;
  for (int64_t i = thread_of_grid(); i < vectors; i += threads_of_grid()) {
    const Bools vector = reinterpret_cast<const Bools*>(words)[i];
#pragma unroll
    for (int e = 0; e < kWordBits; ++e) mine += __popc(vector.item[e]);
  }
  constexpr int kWordsOfVector = kVectorBytes / sizeof(uint16_t);
  for (int64_t i = vectors * kWordsOfVector + thread_of_grid(); i < size; i += threads_of_grid()) {
    mine += __popc(words[i]);
  }
  mine = warp_sum(mine);
  if (lane_of_thread() == 0 && mine != 0) atomic_add(total, mine);
}

}  // namespace

cudaError_t pack_masks(const uint8_t* bools, int64_t rows, int64_t columns, uint16_t* words,
                       cudaStream_t stream) {
  const int64_t all = rows * words_of_columns(columns);
  return launch(pack, blocks_for(all, kThreads), kThreads, stream, bools, all, columns,
                words_of_columns(columns), has_vectors(bools, columns), words);
}

cudaError_t unpack_masks(const uint16_t* words, int64_t rows, int64_t columns, uint8_t* bools,
                         cudaStream_t stream) {
  const int64_t all = rows * words_of_columns(columns);
  return launch(unpack, blocks_for(all, kThreads), kThreads, stream, words, all, columns,
                words_of_columns(columns), has_vectors(bools, columns), bools);
}

cudaError_t count_masks(const uint16_t* words, int64_t count_of_words, int64_t* total,
                        cudaStream_t stream) {
  const cudaError_t error = cudaMemsetAsync(total, 0, sizeof(int64_t), stream);
  if (error != cudaSuccess) return error;
  const bool is_aligned = reinterpret_cast<uintptr_t>(words) % kVectorBytes == 0;
  const int64_t vectors =
      is_aligned ? count_of_words / (kVectorBytes / static_cast<int64_t>(sizeof(uint16_t))) : 0;
  return launch(count, blocks_for(count_of_words, kThreads), kThreads, stream, words, vectors,
                count_of_words, total);
}

}  // namespace pathprune::cuda
