// A tile of a masked weight, read from where it lies dense or packed, and written to shared memory
// with zeros where the mask has none. For .cu files.
//
// A thread takes words of the mask, 16 columns each. It finds where the first of the word's entries
// lies - the beginning of the stretch, and the bits before the word - and reads one after another.
// What is read stays in registers, so that a tile is on its way while the one before is multiplied.

#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "ops/tile_product_cuda.h"
#include "ops/tiled.h"

namespace pathprune::cuda {

// A masked weight as an argument of kernels.
template <typename W>
struct MaskedRows {
  MaskedWeight w;
  bool word_vectors;   // the bits of every stretch are a vector
  bool value_vectors;  // dense: every row is made of whole vectors

  // The bits of columns 16 c, ..; 0 beyond the matrix.
  __device__ __forceinline__ uint32_t word(int64_t group, int64_t row, int64_t c) const {
    if (row >= w.rows || c >= w.words) return 0;
    return w.layout[(group * w.rows + row) * w.words + c] & columns_in_word(w.columns, c);
  }

  // Packed: which value the first entry of a word is. The word must exist.
  __device__ __forceinline__ int64_t start_of_word(int64_t group, int64_t row, int64_t c) const {
    const int64_t flat = group * w.rows + row;
    const uint16_t* first = w.layout + flat * w.words + c / kStretchWords * kStretchWords;
    const int before = static_cast<int>(c % kStretchWords);
    int rank = 0;
    if (word_vectors) {
      const Vector<uint32_t> pairs = *reinterpret_cast<const Vector<uint32_t>*>(first);
#pragma unroll
      for (int i = 0; i < kStretchWords / 2; ++i) {
        const uint32_t counted = before >= 2 * i + 2 ? ~0u : before == 2 * i + 1 ? 0xFFFFu : 0;
        rank += __popc(pairs.item[i] & counted);
      }
    } else {
#pragma unroll
      for (int i = 0; i < kStretchWords - 1; ++i) {
        if (i < before) rank += __popc(first[i]);
      }
    }
    return int64_t{w.tile_start[flat * w.stretches + c / kStretchWords]} + rank;
  }
};

template <typename W>
MaskedRows<W> masked_rows(const MaskedWeight& w) {
  const bool aligned = reinterpret_cast<uintptr_t>(w.layout) % kVectorBytes == 0;
  return {w, aligned && w.words % kStretchWords == 0, has_vectors<W>(w.values, w.columns)};
}

// What a thread brings in of a tile [kRows, kColumns].
template <typename W, int kRows, int kColumns>
class MaskedTile {
 public:
  // Reads from (row, column) of the group on; `column` is a multiple of 16.
  __device__ __forceinline__ void read(const MaskedRows<W>& from, int64_t group, int64_t row,
                                       int64_t column) {
    const MaskedWeight& w = from.w;
    const W* values = static_cast<const W*>(w.values);
#pragma unroll
    for (int u = 0; u < kUnits; ++u) {
      const int64_t r = row + row_of_unit(u);
      const int64_t c = column / kWordBits + word_of_unit(u);
      const uint32_t bits = from.word(group, r, c);
      bits_[u] = bits;
      if (bits == 0) {
#pragma unroll
        for (int i = 0; i < kWordBits; ++i) held_[u][i] = 0;
      } else if (w.tile_start != nullptr) {
        const W* place = values + from.start_of_word(group, r, c);
#pragma unroll
        for (int i = 0; i < kWordBits; ++i) {
          const bool is_entry = bits >> i & 1;
          held_[u][i] = is_entry ? bits_of(*place) : 0;
          place += is_entry;
        }
      } else {
        read_dense(values + (group * w.rows + r) * w.columns + c * kWordBits, from.value_vectors,
                   bits, held_[u]);
      }
    }
    in_pairs_ = kValuesOfRegister == 2 && w.tile_start == nullptr && from.value_vectors;
  }

  __device__ __forceinline__ void write(SharedTile<W, kRows, kColumns>* to) const {
#pragma unroll
    for (int u = 0; u < kUnits; ++u) {
#pragma unroll
      for (int i = 0; i < kWordBits; i += kVector<W>) {
        Vector<uint32_t> vector;
#pragma unroll
        for (int e = 0; e < kRegistersOfVector; ++e) {
          vector.item[e] = masked_register(u, i / kValuesOfRegister + e);
        }
        *reinterpret_cast<Vector<uint32_t>*>(
            to->at(row_of_unit(u), word_of_unit(u) * kWordBits + i)) = vector;
      }
    }
  }

 private:
  static constexpr int kWordsOfRow = kColumns / kWordBits;
  static constexpr int kUnits = kRows * kWordsOfRow / kThreads;
  static_assert(kUnits * kThreads == kRows * kWordsOfRow);
  static constexpr int kValuesOfRegister = 4 / sizeof(W);
  static constexpr int kRegistersOfVector = kVectorBytes / 4;

  static __device__ __forceinline__ int row_of_unit(int u) {
    return (static_cast<int>(threadIdx.x) + u * kThreads) / kWordsOfRow;
  }
  static __device__ __forceinline__ int word_of_unit(int u) {
    return (static_cast<int>(threadIdx.x) + u * kThreads) % kWordsOfRow;
  }

  static __device__ __forceinline__ uint32_t bits_of(float value) {
    return bit_cast<uint32_t>(value);
  }
  template <typename Half>
  static __device__ __forceinline__ uint32_t bits_of(Half value) {
    return value.bits;
  }

  // Vectors without a live weight are not read.
  static __device__ __forceinline__ void read_dense(const W* place, bool vectors, uint32_t bits,
                                                    uint32_t (&held)[kWordBits]) {
    if (vectors) {
#pragma unroll
      for (int i = 0; i < kWordBits; i += kVector<W>) {
        Vector<uint32_t> vector{};
        if (bits_before(bits >> i, kVector<W>)) {
          vector = *reinterpret_cast<const Vector<uint32_t>*>(place + i);
        }
#pragma unroll
        for (int e = 0; e < kRegistersOfVector; ++e) {
          held[i / kValuesOfRegister + e] = vector.item[e];
        }
      }
    } else {
#pragma unroll
      for (int i = 0; i < kWordBits; ++i) held[i] = bits >> i & 1 ? bits_of(place[i]) : 0;
    }
  }

  // The n-th register of a word as it goes to shared memory. Where the values were read one by one
  // they lie one to a register, and are zero off the mask.
  __device__ __forceinline__ uint32_t masked_register(int u, int n) const {
    if constexpr (kValuesOfRegister == 1) {
      return bits_[u] >> n & 1 ? held_[u][n] : 0;
    } else {
      if (!in_pairs_) return held_[u][2 * n] | held_[u][2 * n + 1] << 16;
      const uint32_t two = bits_[u] >> (2 * n);
      return held_[u][n] & ((two & 1 ? 0xFFFFu : 0) | (two & 2 ? 0xFFFF0000u : 0));
    }
  }

  uint32_t held_[kUnits][kWordBits], bits_[kUnits];
  bool in_pairs_;
};

}  // namespace pathprune::cuda
