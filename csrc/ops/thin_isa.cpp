// Convolutions by weights that are mostly zeros, compiled for each instruction set.
//
// The sums of a row over a tile stay in registers; a weight costs one broadcast and, per position,
// one multiply-add that reads a whole, aligned vector.

#include <algorithm>
#include <array>
#include <utility>

#include "ops/lane_shuffle.h"
#include "ops/thin.h"

namespace pathprune::PATHPRUNE_ISA {
namespace {

// Registers that hold sums, of 32 or 16.
constexpr int kSums = PP_AVX512 ? 28 : 12;
constexpr int kMostHeight = 4, kMostWidth = PP_AVX512 ? 8 : 4;

// Compilers would compute every address from the first, with more registers than there are.
template <typename A>
PP_INLINE void hide(const A*& pointer) {
  __asm__("" : "+r"(pointer));
}

template <typename A, int kHeight, int kWide, bool kDense>
void add(const ThinEntries<A>& w, int64_t rows, const ThinTile<A>& tile) {
  // copies: what is written could be what a reference refers to
  const int64_t *const begins = w.begin, y_plane = tile.y_plane, y_pitch = tile.y_pitch;
  const int32_t* const shifts = w.shifts;
  const A *const values = w.values, *const start = tile.start, *const tile_x = tile.x;
  const int64_t step = kDense ? kWidth<A> : tile.x_step, pitch = tile.x_pitch;
  A* to = tile.y;
  for (int64_t r = 0; r < rows; ++r, to += y_plane) {
    const int64_t begin = begins[r], end = begins[r + 1];
    if (begin == end && !start) continue;
    Vector<A> sums[kHeight][kWide];
    A* at = to;
#pragma GCC unroll 8
    for (int y = 0; y < kHeight; ++y, at += y_pitch) {
#pragma GCC unroll 8
      for (int x = 0; x < kWide; ++x) {
        sums[y][x] = start ? start[r] - Vector<A>{} : load_vector(at + x * kWidth<A>);
      }
    }
    for (int64_t i = begin; i < end; ++i) {
      const Vector<A> value = values[i] - Vector<A>{};
      const A* from = tile_x + shifts[i];
#pragma GCC unroll 8
      for (int y = 0; y < kHeight; ++y) {
#pragma GCC unroll 8
        for (int x = 0; x < kWide; ++x) {
          sums[y][x] = fused<A>(value, load_vector(from + x * step), sums[y][x]);
        }
        from += pitch;
        hide(from);
      }
    }
    at = to;
#pragma GCC unroll 8
    for (int y = 0; y < kHeight; ++y, at += y_pitch) {
#pragma GCC unroll 8
      for (int x = 0; x < kWide; ++x) store_vector(at + x * kWidth<A>, sums[y][x]);
    }
  }
}

template <typename A>
using Add = decltype(ThinKernels<A>::add);

template <typename A, bool kDense, int... kAt>
constexpr std::array<Add<A>, sizeof...(kAt)> adds(std::integer_sequence<int, kAt...>) {
  const auto one = [](auto at) constexpr -> Add<A> {
    constexpr int kHeight = at / kMostWidth + 1, kWide = at % kMostWidth + 1;
    if constexpr (kHeight * kWide <= kSums) {
      return add<A, kHeight, kWide, kDense>;
    } else {
      return nullptr;
    }
  };
  return {one(std::integral_constant<int, kAt>())...};
}

template <typename A>
void add_any(const ThinEntries<A>& w, int64_t rows, const ThinTile<A>& tile) {
  constexpr auto kAll = std::make_integer_sequence<int, kMostHeight * kMostWidth>();
  static constexpr auto kDense = adds<A, true>(kAll), kOther = adds<A, false>(kAll);
  const int64_t at = (tile.height - 1) * kMostWidth + tile.width - 1;
  (tile.x_step == kWidth<A> ? kDense : kOther)[at](w, rows, tile);
}

}  // namespace

template <typename A>
ThinKernels<A> thin_kernels() {
  return {{kSums, kMostWidth, kMostHeight}, add_any<A>};
}

template ThinKernels<float> thin_kernels<float>();
template ThinKernels<double> thin_kernels<double>();

}  // namespace pathprune::PATHPRUNE_ISA
