// Convolutions by weights that are mostly zeros, compiled for each instruction set.
//
// Positions lie in the lanes. The sums of a row over a tile stay in registers; an entry costs one
// broadcast and, per vector of positions, one load (that may cross a cache line) and one
// multiply-add. Two rows share the loads, which pays where they share most of their entries.

#include <algorithm>

#include "ops/lane_shuffle.h"
#include "ops/thin.h"

namespace pathprune::PATHPRUNE_ISA {
namespace {

// Registers that hold sums, of 16 or 32.
constexpr int kSums = PP_AVX512 ? 16 : 12;

template <typename A>
constexpr int kTileVectors = std::clamp(kSums / Lanes<A>::kParts, 2, 8);

template <typename A>
PP_INLINE void copy(A* to, const A* from, int64_t count) {
  for (; count >= kLanes; count -= kLanes, to += kLanes, from += kLanes) store(to, load(from));
#if PP_AVX512
  if constexpr (sizeof(A) == 4) {
    const auto some = static_cast<__mmask16>(first_lanes(count));
    _mm512_mask_storeu_ps(to, some, _mm512_maskz_loadu_ps(some, from));
    return;
  }
#endif
  for (int64_t i = 0; i < count; ++i) to[i] = from[i];
}

// Compilers would load once for every multiply-add instead: loads are what there are most of.
template <typename A>
PP_INLINE void keep(Lanes<A>& v) {
#if defined(__AVX2__)
  for (auto& part : v.part) __asm__("" : "+v"(part));
#endif
}

template <typename A, int kRows, int kVectors>
PP_INLINE void sum(const ThinRows& w, const ThinTile<A>& tile, int64_t first,
                   A (&made)[2][kTileVectors<A> * kLanes]) {
  Lanes<A> sums[kRows][kVectors];
  for (int r = 0; r < kRows; ++r) {
    const Lanes<A> bias = broadcast(tile.bias ? tile.bias[w.row + r] : A(0));
    for (int j = 0; j < kVectors; ++j) {
      sums[r][j] = w.lacks[r] ? load(tile.whole + first + j * kLanes) + bias : bias;
    }
  }
  const A* x = tile.x + first;
  const A* values = tile.values + w.values_begin;
  for (int64_t i = w.begin; i < w.end; ++i, values += kRows) {
    Vector<A> value[kRows];
    for (int r = 0; r < kRows; ++r) value[r] = values[r] - Vector<A>{};
    const A* from = x + tile.shifts[i];
    for (int j = 0; j < kVectors; ++j) {
      Lanes<A> read = load(from + j * kLanes);
      if constexpr (kRows > 1) keep(read);
      for (int r = 0; r < kRows; ++r) {
        for (int p = 0; p < Lanes<A>::kParts; ++p) {
          sums[r][j].part[p] = fused<A>(value[r], read.part[p], sums[r][j].part[p]);
        }
      }
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (int j = 0; j < kVectors; ++j) store(made[r] + first + j * kLanes, sums[r][j]);
  }
}

template <typename A, int kRows>
PP_INLINE void make(const ThinRows& w, const ThinTile<A>& tile,
                    A (&made)[2][kTileVectors<A> * kLanes]) {
  constexpr int kMost = kSums / Lanes<A>::kParts / kRows;
  constexpr int kWhole = std::clamp(kMost, 1, kTileVectors<A>);
  constexpr int kHalf = std::max(kWhole / 2, 1);
  for (int64_t first = 0; first < tile.positions;) {
    if (tile.positions - first > kHalf * kLanes) {
      sum<A, kRows, kWhole>(w, tile, first, made);
      first += kWhole * kLanes;
    } else {
      sum<A, kRows, kHalf>(w, tile, first, made);
      first += kHalf * kLanes;
    }
  }
}

template <typename A>
void multiply(const ThinRows* rows, int64_t count, const ThinTile<A>& tile) {
  A made[2][kTileVectors<A> * kLanes];
  for (int64_t k = 0; k < count; ++k) {
    const ThinRows& w = rows[k];
    if (w.count == 2) {
      make<A, 2>(w, tile, made);
    } else {
      make<A, 1>(w, tile, made);
    }
    for (int r = 0; r < w.count; ++r) {
      A* y = tile.y + (w.row + r) * tile.plane;
      for (int64_t s = 0; s < tile.segment_count; ++s) {
        const ThinSegment& segment = tile.segments[s];
        copy(y + segment.to, made[r] + segment.from, segment.count);
      }
    }
  }
}

}  // namespace

template <typename A>
ThinKernels<A> thin_kernels() {
  return {kTileVectors<A> * kLanes, multiply<A>};
}

template ThinKernels<float> thin_kernels<float>();
template ThinKernels<double> thin_kernels<double>();

}  // namespace pathprune::PATHPRUNE_ISA
