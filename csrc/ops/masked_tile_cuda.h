// A tile of a masked weight, read from where it lies dense or packed, and written to shared memory
// with zeros where the mask has none. For .cu files.
//
// Eight or sixteen lanes take a row. Of packed weights they take entries side by side, and each
// goes to its column, which is read: to find it by its bit takes a third more instructions, and
// those bound the kernel, not bytes (benchmarks/roofline.md). Of dense weights they take vectors,
// of which the bits say what stays. What is read stays in registers, so that a tile is on its way
// while the one before is multiplied.

#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "ops/tile_product_cuda.h"
#include "ops/tiled.h"

namespace pathprune::cuda {

// How the threads of a block lie over a tile [kRows, kColumns]: some lanes of a warp take a row,
// and kPasses times the block takes kRowsAtOnce rows.
template <typename W, int kRows_, int kColumns_>
struct RowLanes {
  using Shared = SharedTile<W, kRows_, kColumns_>;
  static constexpr int kColumns = kColumns_, kLanesOfRow = kColumns >= 128 ? 16 : 8;
  static constexpr int kRowsAtOnce = kThreads / kLanesOfRow, kPasses = kRows_ / kRowsAtOnce;
  static constexpr int kVectors = kColumns / kVector<W> / kLanesOfRow;  // of a lane
  static_assert(kPasses * kRowsAtOnce == kRows_ && kVectors * kVector<W> <= 8);

  static __device__ __forceinline__ int lane() {
    return static_cast<int>(threadIdx.x) % kLanesOfRow;
  }
  static __device__ __forceinline__ int row(int pass) {
    return pass * kRowsAtOnce + static_cast<int>(threadIdx.x) / kLanesOfRow;
  }
  static __device__ __forceinline__ int column(int vector) {
    return (lane() * kVectors + vector) * kVector<W>;
  }
};

template <typename W, int kRows, int kColumns, bool kIsPacked>
class MaskedTile;

template <typename W, int kRows, int kColumns>
class MaskedTile<W, kRows, kColumns, true> : RowLanes<W, kRows, kColumns> {
  using Lanes = RowLanes<W, kRows, kColumns>;
  using Lanes::kPasses, Lanes::kRowsAtOnce, Lanes::kVectors;
  using typename Lanes::Shared;
  static constexpr int kLanes = Lanes::kLanesOfRow;

 public:
  // Reads the thread's part of the tile that begins at (row, column) of the group.
  __device__ __forceinline__ void read(const MaskedWeight& w, int group, int row, int column) {
    Starts starts(w, group, row, column);
    column_ = column;
    longest_ = 0;
#pragma unroll
    for (int p = 0; p < kPasses; ++p, starts.go_down()) {
      const int begin = starts.begin(p);
      count_[p] = starts.end(p) - begin;
      longest_ = count_[p] > longest_ ? count_[p] : longest_;
      const W* values = static_cast<const W*>(w.values) + begin;
      const uint16_t* index = w.index + begin;
#pragma unroll
      for (int b = 0; b < kBatches; ++b) {
        const int i = b * kLanes;
        if (i < count_[p]) held_[p][b].read(values + i, index + i);
      }
    }
  }

  __device__ __forceinline__ void write(const MaskedWeight& w, int group, int row, int column,
                                        Shared* to) const {
#pragma unroll
    for (int p = 0; p < kPasses; ++p) {
#pragma unroll
      for (int v = 0; v < kVectors; ++v) *to->at(Lanes::row(p), Lanes::column(v)) = {};
    }
    __syncwarp();  // zeros first: a row belongs to lanes of one warp
#pragma unroll
    for (int p = 0; p < kPasses; ++p) {
#pragma unroll
      for (int b = 0; b < kBatches; ++b) {
        if (b * kLanes < count_[p]) put(to, p, held_[p][b]);
      }
    }
    if (longest_ <= kBatches * kLanes) return;
    // What is more than was held: of all rows at once, so that many reads are on their way.
    int begin[kPasses];
    Starts starts(w, group, row, column);
#pragma unroll
    for (int p = 0; p < kPasses; ++p, starts.go_down()) begin[p] = starts.begin(p);
#pragma unroll 1
    for (int i = kBatches * kLanes; i < longest_; i += kLanes) {
      Entry entry[kPasses];
#pragma unroll
      for (int p = 0; p < kPasses; ++p) {
        const int place = begin[p] + i;
        if (i < count_[p]) entry[p].read(static_cast<const W*>(w.values) + place, w.index + place);
      }
#pragma unroll
      for (int p = 0; p < kPasses; ++p) {
        if (i < count_[p]) put(to, p, entry[p]);
      }
    }
  }

 private:
  static constexpr int kBatches = 2;  // of entries of a row that are held
  static constexpr uint32_t kSize = sizeof(W);

  // In a register each, so that nothing waits for what is read in order to pack it.
  struct Entry {
    uint32_t value, index;

    __device__ __forceinline__ void read(const W* of_value, const uint16_t* of_index) {
      if constexpr (sizeof(W) == 4) {
        value = bit_cast<uint32_t>(*of_value);
      } else {
        value = of_value->bits;
      }
      index = *of_index;
    }
  };

  // Where the entries of the tile's rows begin and end; those of this lane are kLanes apart.
  struct Starts {
    const int32_t* first;
    int64_t step;
    int stretches, rows;

    __device__ __forceinline__ Starts(const MaskedWeight& w, int group, int row, int column)
        : step(kRowsAtOnce * w.stretches) {
      constexpr int kMost = (kColumns + kStretch - 1) / kStretch;
      const int stretch = column / kStretch, left = static_cast<int>(w.stretches) - stretch;
      const int64_t flat = group * w.rows + row + Lanes::row(0);
      first = w.tile_start + flat * w.stretches + stretch;
      stretches = left < kMost ? left : kMost;
      rows = static_cast<int>(w.rows) - row - Lanes::row(0);
    }
    // Of the row of a pass, and 0 where it does not exist.
    __device__ __forceinline__ int begin(int pass) const {
      return pass * kRowsAtOnce < rows ? first[0] + Lanes::lane() : 0;
    }
    __device__ __forceinline__ int end(int pass) const {
      return pass * kRowsAtOnce < rows ? first[stretches] : 0;
    }
    __device__ __forceinline__ void go_down() { first += step; }
  };

  // A tile begins at a multiple of its columns, and so, of 2^16 too, of them the index has the
  // rest.
  __device__ __forceinline__ void put(Shared* to, int pass, const Entry& entry) const {
    if (kColumns < kStretch && (entry.index ^ column_) & kColumns) return;  // the stretch is wider
    const uint32_t row = Shared::offset(Lanes::row(pass), 0);
    const uint32_t of_row = entry.index * kSize & (kColumns * kSize - 1);
    char* place = reinterpret_cast<char*>(to) + (row ^ of_row);
    if constexpr (sizeof(W) == 4) {
      *reinterpret_cast<uint32_t*>(place) = entry.value;
    } else {
      *reinterpret_cast<uint16_t*>(place) = static_cast<uint16_t>(entry.value);
    }
  }

  int count_[kPasses], longest_;  // entries of each row from the lane's first on
  Entry held_[kPasses][kBatches];
  int column_;
};

template <typename W, int kRows, int kColumns>
class MaskedTile<W, kRows, kColumns, false> : RowLanes<W, kRows, kColumns> {
  using Lanes = RowLanes<W, kRows, kColumns>;
  using Lanes::kPasses, Lanes::kRowsAtOnce, Lanes::kVectors;
  using typename Lanes::Shared;

 public:
  __device__ __forceinline__ void read(const MaskedWeight& w, int group, int row, int column) {
    const int64_t flat = group * w.rows + row + Lanes::row(0);
    const int first = column + Lanes::column(0), c = first / kWordBits;
    const int rows = c < w.words ? static_cast<int>(w.rows) - row - Lanes::row(0) : 0;
    const uint16_t* word = w.layout + flat * w.words + c;
    const uint32_t live = columns_in_word(w.columns, c);
#pragma unroll
    for (int p = 0; p < kPasses; ++p, word += kRowsAtOnce * w.words) {
      const uint32_t bits = p * kRowsAtOnce < rows ? *word & live : 0;
      bits_[p] = bits_before(bits >> (first % kWordBits), kVectors * kVector<W>);
    }
    const W* place = static_cast<const W*>(w.values) + flat * w.stride + first;
#pragma unroll
    for (int p = 0; p < kPasses; ++p, place += kRowsAtOnce * w.stride) {
      if (bits_[p] == 0) continue;
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
        held_[p][v] = *reinterpret_cast<const Vector<W>*>(place + v * kVector<W>);
      }
    }
  }

  __device__ __forceinline__ void write(const MaskedWeight&, int, int, int, Shared* to) const {
#pragma unroll
    for (int p = 0; p < kPasses; ++p) {
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
        *to->at(Lanes::row(p), Lanes::column(v)) =
            masked(held_[p][v], bits_[p] >> (v * kVector<W>));
      }
    }
  }

 private:
  // The values whose bits are set, and zeros.
  static __device__ __forceinline__ Vector<W> masked(const Vector<W>& vector, uint32_t bits) {
    constexpr int kOfRegister = 4 / sizeof(W);
    auto registers = bit_cast<Vector<uint32_t>>(vector);
#pragma unroll
    for (int e = 0; e < kVector<uint32_t>; ++e) {
      const uint32_t own = bits >> (e * kOfRegister);
      // Two bits become two halves of a register.
      registers.item[e] &=
          kOfRegister == 1 ? 0u - (own & 1) : ((own & 1) | (own & 2) << 15) * 0xFFFFu;
    }
    return bit_cast<Vector<W>>(registers);
  }

  uint32_t bits_[kPasses];  // of the lane's vectors
  Vector<W> held_[kPasses][kVectors];
};

}  // namespace pathprune::cuda
