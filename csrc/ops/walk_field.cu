// Sums over kernels, and steps over units and positions.
//
// A walker in a field is at one of units times positions, so few share a place and none are
// grouped: a warp takes a walker. Its lanes take entries of candidates side by side, four times
// over: the largest weight, the rough sum that gives the scale, the total, and the entry whose CDF
// exceeds the draw, where it stops.
//
// Bytes: a sum 8 and its kernel; a walker up to four times the weights of its unit and the flow
// where they lead, from L2 where it holds them, and 48.

#include "ops/kernels_cuda.h"
#include "ops/tile_cuda.h"
#include "ops/warp_cuda.h"

namespace pathprune::cuda {
namespace {

using Unsigned = unsigned long long;

template <typename W>
__global__ void __launch_bounds__(kThreads)
    sum_kernels(const W* values, const int64_t kernels, const int64_t entries, const WalkRule rule,
                double* mass) {
  for (int64_t i = thread_of_grid(); i < kernels; i += threads_of_grid()) {
    mass[i] = candidate_weight(values + i * entries, entries, rule);
  }
}

// Notes the first of `count` things that is refused, counted from the end: 0 is none.
__device__ __forceinline__ void refuse_at(int64_t* refused, int64_t i, int64_t count) {
  atomicMax(reinterpret_cast<Unsigned*>(refused), static_cast<Unsigned>(count - i));
}

__global__ void __launch_bounds__(kThreads)
    check_places(const WalkField field, const FieldSizes sizes, const int64_t* units,
                 FieldRefusals* found) {
  for (int64_t i = thread_of_grid(); i < sizes.walkers; i += threads_of_grid()) {
    if (units[i] < 0 || units[i] >= sizes.units) refuse_at(&found->unit, i, sizes.walkers);
    if (field.at[i] < 0 || field.at[i] >= sizes.places) {
      refuse_at(&found->position, i, sizes.walkers);
    }
  }
  for (int64_t i = thread_of_grid(); i < sizes.leads; i += threads_of_grid()) {
    if (field.position[i] >= field.positions) refuse_at(&found->lead, i, sizes.leads);
  }
}

// What a walker chooses from: the entries of its unit's candidates, one after another.
template <typename W>
struct Choices {
  const W* values;
  const int64_t* leads_to;
  int64_t first, stride, entries, first_target, count;

  __device__ Choices(const WalkMatrix& m, const WalkField& field, int64_t unit, int64_t position)
      : values(static_cast<const W*>(m.values)),
        leads_to(field.position + position * m.entries),
        first(m.first(unit)),
        stride(m.stride()),
        entries(m.entries),
        first_target(m.group_of(unit) * m.candidates()),
        count(m.candidates() * m.entries) {}

  __device__ int64_t edge(int64_t i) const { return first + i / entries * stride + i % entries; }
  __device__ double weight(int64_t i, int power, const WalkField& field) const {
    return field_weight(values[edge(i)], power, field, first_target + i / entries,
                        leads_to[i % entries]);
  }
};

__device__ __forceinline__ double warp_largest(double value) {
  for (int apart = kLanes / 2; apart > 0; apart /= 2) {
    const double other = __shfl_xor_sync(kAllLanes, value, apart);
    value = other > value ? other : value;
  }
  return value;
}

template <typename W>
__global__ void __launch_bounds__(kThreads, 1)
    move_in_field(const WalkMatrix m, const WalkRule rule, const WalkField field,
                  const Walkers walkers) {
  const int lane = lane_of_thread();
  for (int64_t i = warp_of_grid(); i < walkers.count; i += warps_of_grid()) {
    const Choices<W> from(m, field, walkers.units[i], field.at[i]);
    double largest = 0;
    for (int64_t k = lane; k < from.count; k += kLanes) {
      const double weight = from.weight(k, rule.power, field);
      if (weight > largest) largest = weight;
    }
    largest = warp_largest(largest);
    int64_t chosen = -1;
    if (largest > 0) {
      const int rough = rough_scale(from.count, exponent_of(largest));
      uint64_t sum = 0;
      for (int64_t k = lane; k < from.count; k += kLanes) {
        sum += scaled_integer(from.weight(k, rule.power, field), rough, 0);
      }
      const int scale = final_scale(from.count, rough, warp_sum(sum));
      sum = 0;
      for (int64_t k = lane; k < from.count; k += kLanes) {
        sum += scaled_integer(from.weight(k, rule.power, field), scale, 1);
      }
      const uint64_t word = walk_word(rule.seed, walkers.walks[i], rule.step, WalkWord::kUnit);
      const uint64_t draw = fixed_draw(word, warp_sum(sum));
      uint64_t before = 0;
      for (int64_t begin = 0; chosen < 0; begin += kLanes) {  // the total exceeds the draw
        const int64_t k = begin + lane;
        const uint64_t own =
            k < from.count ? scaled_integer(from.weight(k, rule.power, field), scale, 1) : 0;
        uint64_t of_warp;
        const uint64_t sum_before = warp_sum_before(own, lane, &of_warp);
        const uint32_t passes = __ballot_sync(kAllLanes, before + sum_before + own > draw);
        if (passes) chosen = begin + __ffs(static_cast<int>(passes)) - 1;
        before += of_warp;
      }
    }
    if (lane == 0) {
      walkers.next[i] = chosen < 0 ? -1 : from.first_target + chosen / from.entries;
      walkers.edge[i] = chosen < 0 ? -1 : from.edge(chosen);
      field.next_position[i] = chosen < 0 ? -1 : from.leads_to[chosen % from.entries];
    }
  }
}

}  // namespace

cudaError_t sum_walk_kernels(const WalkMatrix& m, const WalkRule& rule, double* mass,
                             cudaStream_t stream) {
  const int64_t kernels = m.groups * m.rows * m.columns;
  return by_storage(m.storage, false, [&]<typename W, bool kPacked>() {
    return launch(sum_kernels<W>, blocks_for(kernels, kThreads), kThreads, stream,
                  static_cast<const W*>(m.values), kernels, m.entries, rule, mass);
  });
}

cudaError_t check_field_places(const WalkField& field, const FieldSizes& sizes,
                               const int64_t* units, FieldRefusals* found, cudaStream_t stream) {
  const cudaError_t error = cudaMemsetAsync(found, 0, sizeof(*found), stream);
  if (error != cudaSuccess) return error;
  const int64_t most = sizes.walkers > sizes.leads ? sizes.walkers : sizes.leads;
  return launch(check_places, blocks_for(most, kThreads), kThreads, stream, field, sizes, units,
                found);
}

cudaError_t move_walkers_in_field(const WalkMatrix& m, const WalkRule& rule, const WalkField& field,
                                  const Walkers& walkers, cudaStream_t stream) {
  return by_storage(m.storage, false, [&]<typename W, bool kPacked>() {
    return launch(move_in_field<W>, blocks_for(walkers.count, kWarps), kThreads, stream, m, rule,
                  field, walkers);
  });
}

}  // namespace pathprune::cuda
