// Products with shifts of one row, compiled for each instruction set.
//
// Positions lie in the lanes. The sums of a row over a tile stay in registers; an entry costs one
// broadcast and, per vector of positions, one multiply-add with an operand from memory. What a tile
// reads of every channel stays in the cache while all rows pass by.

#include <algorithm>

#include "ops/lane_shuffle.h"
#include "ops/shifted.h"

namespace pathprune::PATHPRUNE_ISA {
namespace {

// Of 16 or 32 registers, those that hold sums.
template <typename A>
constexpr int kVectors =
    std::clamp(PP_AVX512 ? 16 / Lanes<A>::kParts : 12 / Lanes<A>::kParts, 1, 8);

template <typename A>
int64_t compact(const A* row, const int64_t* shift, int64_t columns, A* values, int64_t* shifts) {
  int64_t found = 0;
  for (int64_t k = 0; k < columns; ++k) {  // without a branch: every entry is written
    values[found] = row[k];
    shifts[found] = shift[k];
    found += row[k] != 0;
  }
  return found;
}

template <typename A, int kCount>
PP_INLINE void tile(const ShiftedRows<A>& w, int64_t begin, int64_t end, const A* x, int64_t length,
                    A* y) {
  for (int64_t r = begin; r < end; ++r) {
    Lanes<A> sums[kCount];
    for (auto& sum : sums) sum = broadcast(A(0));
    for (int64_t i = w.start[r]; i < w.start[r + 1]; ++i) {
      const Vector<A> value = w.values[i] - Vector<A>{};
      const A* from = x + w.shifts[i];
      for (int j = 0; j < kCount; ++j) {
        const Lanes<A> read = load(from + j * kLanes);
        for (int p = 0; p < Lanes<A>::kParts; ++p) {
          sums[j].part[p] = fused<A>(value, read.part[p], sums[j].part[p]);
        }
      }
    }
    for (int j = 0; j < kCount; ++j) store(y + r * length + j * kLanes, sums[j]);
  }
}

// What is left behind the last whole vector.
template <typename A>
void edge(const ShiftedRows<A>& w, int64_t begin, int64_t end, const A* x, int64_t count,
          int64_t length, A* y) {
  for (int64_t r = begin; r < end; ++r) {
    A sums[kLanes] = {};
    for (int64_t i = w.start[r]; i < w.start[r + 1]; ++i) {
      const A* from = x + w.shifts[i];
      for (int64_t t = 0; t < count; ++t) sums[t] += w.values[i] * from[t];
    }
    std::copy_n(sums, count, y + r * length);
  }
}

template <typename A>
void multiply(const ShiftedRows<A>& w, int64_t begin, int64_t end, const A* x, int64_t first,
              int64_t count, int64_t length, A* y) {
  constexpr int64_t kTile = kVectors<A> * kLanes;
  x += first;
  y += first;
  if (count == kTile) return tile<A, kVectors<A>>(w, begin, end, x, length, y);
  for (; count >= kLanes; count -= kLanes, x += kLanes, y += kLanes) {
    tile<A, 1>(w, begin, end, x, length, y);
  }
  if (count > 0) edge(w, begin, end, x, count, length, y);
}

}  // namespace

template <typename A>
ShiftedKernels<A> shifted_kernels() {
  return {kVectors<A> * kLanes, compact<A>, multiply<A>};
}

template ShiftedKernels<float> shifted_kernels<float>();
template ShiftedKernels<double> shifted_kernels<double>();

}  // namespace pathprune::PATHPRUNE_ISA
