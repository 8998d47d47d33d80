// Gradients by the weights that are kept, compiled for each instruction set.
//
// The sums of a few weights of a row stay in registers while positions go by: each costs one
// aligned load of x and one multiply-add; a load of g serves all of them. Their lanes are summed
// crosswise at the end of a tile.

#include <algorithm>

#include "ops/lane_shuffle.h"
#include "ops/thin_sample.h"

namespace pathprune::PATHPRUNE_ISA {
namespace {

constexpr int kGroup = 8;  // weights at once: their multiply-adds hide each other's latency
static_assert(kWidth<float> <= 2 * kGroup);

// Adds the first lanes of a vector: all, or the half of them.
template <typename A, int... kLane>
PP_INLINE void add_first(A* to, Vector<A> v, std::integer_sequence<int, kLane...>) {
  typedef A Few __attribute__((vector_size(sizeof...(kLane) * sizeof(A))));
  Few sum;
  std::memcpy(&sum, to, sizeof(sum));
  sum += __builtin_shufflevector(v, v, kLane...);
  std::memcpy(to, &sum, sizeof(sum));
}

// Adds the sum over the lanes of every vector.
template <typename A>
PP_INLINE void add_lanes(const Vector<A> (&vectors)[kGroup], A* sums) {
  constexpr int kAtOnce = std::min(kWidth<A>, kGroup);
  for (int first = 0; first < kGroup; first += kAtOnce) {
    Vector<A> v = sum_crosswise<A, kAtOnce>(
        [&](int i) __attribute__((always_inline)) { return vectors[first + i]; });
    if constexpr (kWidth<A> > kAtOnce) v = v + trade<A, kAtOnce, true>(v, v);
    add_first<A>(sums + first, v, std::make_integer_sequence<int, kAtOnce>());
  }
}

template <typename A, int kCount>
PP_INLINE void add_group(const A* g, const int32_t* shifts, const SampleTile<A>& tile, A* sums) {
  Vector<A> made[kGroup] = {};
  const A* from[kCount];
#pragma GCC unroll 8
  for (int i = 0; i < kCount; ++i) from[i] = tile.x + shifts[i];
  for (int64_t y = 0; y < tile.height; ++y) {
    int64_t at = y * tile.x_pitch;
    for (int64_t x = 0; x < tile.width; ++x, at += tile.x_step) {
      const Vector<A> factor = load_vector(g + x * kWidth<A>);
#pragma GCC unroll 8
      for (int i = 0; i < kCount; ++i) {
        made[i] = fused<A>(factor, load_vector(from[i] + at), made[i]);
      }
    }
    g += tile.g_pitch;
  }
  add_lanes<A>(made, sums);
}

template <typename A, int kMost = kGroup>
PP_INLINE void add_group(int64_t count, const A* g, const int32_t* shifts,
                         const SampleTile<A>& tile, A* sums) {
  if constexpr (kMost > 1) {
    if (count < kMost) return add_group<A, kMost - 1>(count, g, shifts, tile, sums);
  }
  add_group<A, kMost>(g, shifts, tile, sums);
}

template <typename A>
void add(const SampleRun* runs, int64_t count, const int32_t* shifts, const SampleTile<A>& tile,
         A* sums) {
  for (int64_t k = 0; k < count; ++k) {
    const SampleRun& run = runs[k];
    const A* g = tile.g + run.row * tile.g_plane;
    int64_t groups = (run.end - run.begin + kGroup - 1) / kGroup;
    for (int64_t i = run.begin; i < run.end; --groups) {
      const int64_t size = (run.end - i + groups - 1) / groups;  // as even as may be
      add_group<A>(size, g, shifts + i, tile, sums + i);
      i += size;
    }
  }
}

}  // namespace

template <typename A>
SampleKernels<A> sample_kernels() {
  return {kGroup, add<A>};
}

template SampleKernels<float> sample_kernels<float>();
template SampleKernels<double> sample_kernels<double>();

}  // namespace pathprune::PATHPRUNE_ISA
