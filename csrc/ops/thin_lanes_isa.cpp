// Images laid into the lanes and taken out of them, compiled for each instruction set.

#include "ops/lane_shuffle.h"
#include "ops/thin_lanes.h"

namespace pathprune::PATHPRUNE_ISA {
namespace {

static_assert(kWidth<float> <= kMostThinLanes);

// What lies in a lane is read and written so many numbers at a time: images are often a multiple of
// a page apart, and their lines would drive each other out of the cache between parts of one.
constexpr int kAtOnce = 128;

template <typename A>
struct Stage {
  static constexpr int kWide = kWidth<A>;
  static constexpr int kPitch = kAtOnce + 64 / static_cast<int>(sizeof(A));
  alignas(64) A lane[kWide][kPitch];

  void transpose_from(int64_t first, Vector<A> (&v)[kWide]) const {
    for (int i = 0; i < kWide; ++i) v[i] = load_vector(lane[i] + first);
    transpose<A>(v);
  }
  void transpose_to(int64_t first, Vector<A> (&v)[kWide]) {
    transpose<A>(v);
    for (int i = 0; i < kWide; ++i) store_vector(lane[i] + first, v[i]);
  }
};

// Compilers would call for a copy in place of the loop, which begins slowly.
template <typename V>
PP_INLINE void keep(V& v) {
#if defined(__SSE2__)
  __asm__("" : "+v"(v));
#endif
}

template <typename A>
PP_INLINE void copy(A* to, const A* from, int64_t count) {
  constexpr int kWide = kWidth<A>;
  if (count < kWide) {
    for (int64_t i = 0; i < count; ++i) to[i] = from[i];
    return;
  }
  for (int64_t i = 0; i + kWide <= count; i += kWide) {
    Vector<A> v = load_vector(from + i);
    keep(v);
    store_vector(to + i, v);
  }
  store_vector(to + count - kWide, load_vector(from + count - kWide));
}

template <typename A>
void lay(const A* const* from, int64_t count, int64_t width, int64_t pitch, A* to) {
  constexpr int kWide = kWidth<A>;
  Stage<A> stage;
  int64_t column = 0;
  for (int64_t first = 0; first < count; first += kAtOnce) {
    const int64_t some = std::min<int64_t>(count - first, kAtOnce);
    for (int l = 0; l < kWide; ++l) {
      if (from[l]) {
        copy(stage.lane[l], from[l] + first, some);
      } else {
        for (int64_t i = 0; i < some; i += kWide) store_vector(stage.lane[l] + i, Vector<A>{});
      }
    }
    for (int64_t i = 0; i < some; i += kWide) {
      Vector<A> v[kWide];
      stage.transpose_from(i, v);
#pragma GCC unroll 16
      for (int j = 0; j < kWide; ++j) {
        if (i + j >= some) break;
        store_vector(to + column * kWide, v[j]);
        if (++column == width) {
          column = 0;
          to += pitch;
        }
      }
    }
  }
}

template <typename A>
void take(const A* from, int64_t count, A* const* to) {
  constexpr int kWide = kWidth<A>;
  Stage<A> stage;
  for (int64_t first = 0; first < count; first += kAtOnce) {
    const int64_t some = std::min<int64_t>(count - first, kAtOnce);
    for (int64_t i = 0; i < some; i += kWide) {
      Vector<A> v[kWide] = {};
#pragma GCC unroll 16
      for (int j = 0; j < kWide; ++j, from += kWide) {
        if (i + j >= some) break;
        v[j] = load_vector(from);
      }
      stage.transpose_to(i, v);
    }
    for (int l = 0; l < kWide; ++l) {
      if (to[l]) copy(to[l] + first, stage.lane[l], some);
    }
  }
}

}  // namespace

template <typename A>
LaneKernels<A> lane_kernels() {
  return {kWidth<A>, lay<A>, take<A>};
}

template LaneKernels<float> lane_kernels<float>();
template LaneKernels<double> lane_kernels<double>();

}  // namespace pathprune::PATHPRUNE_ISA
