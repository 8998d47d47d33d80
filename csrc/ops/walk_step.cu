// One step of many walkers. They are grouped by the unit they are at, by a counting sort; their
// order within a unit shows in no result. A block takes a job: a few units side by side, so that
// whole sectors of memory are read where a unit's candidates lie far apart, and up to 4096 of the
// walkers at them. It makes the units' tables in shared memory, the prefix sums of stretches of
// candidates; a stretch is one candidate where there are few enough. Then a thread takes a walker:
// it searches the table, and adds up the stretch that it finds candidate by candidate.
//
// Bytes: a job's weights three times, twice of them from L2 where it holds those of the jobs that
// run at once; for each walker 72, and the stretch it ends in once more if that is longer than one.

#include <cub/device/device_scan.cuh>

#include "ops/kernels_cuda.h"
#include "ops/tile_cuda.h"
#include "ops/warp_cuda.h"

namespace pathprune::cuda {
namespace {

constexpr int kStepWarps = 16;
constexpr int kStepThreads = kStepWarps * kLanes;
constexpr int kSums = 5120;  // of a job's table: 40 KB
// A job's units share warps, and a unit has whole warps where its table is summed up.
constexpr int kMostUnits = kStepWarps;
constexpr int kSectorBytes = 32;
// Walkers of a job: enough to outweigh the table's making, few enough that those at one unit are
// shared out.
constexpr int64_t kMostWalkers = 4096;
// Weights that a thread has on their way at once.
constexpr int kAhead = 4;

// How the units are cut into tiles, and the candidates of each into stretches.
struct Cut {
  int64_t sources;         // units of a group
  int64_t tiles_of_group;  // whose last may be short
  int tile;                // units: a power of two up to kMostUnits
  int stretches;
  int64_t stretch;  // candidates

  PP_HD int64_t first_unit(int64_t n) const {
    return n / tiles_of_group * sources + n % tiles_of_group * tile;
  }
  PP_HD int64_t units_of(int64_t n) const {
    const int64_t left = sources - n % tiles_of_group * tile;
    return left < tile ? left : tile;
  }
};

Cut cut(const WalkMatrix& m, size_t value_bytes) {
  const int64_t sources = m.to_rows ? m.columns : m.rows;
  const int64_t bytes = m.entries * static_cast<int64_t>(value_bytes);
  int tile = 1;
  while (m.to_rows && tile < kMostUnits && tile * bytes < kSectorBytes && tile < sources) tile *= 2;
  const int64_t stretch = ceil_divide(m.candidates(), kSums / tile);
  const int64_t stretches = stretch ? ceil_divide(m.candidates(), stretch) : 1;
  return {sources, ceil_divide(sources, tile), tile, static_cast<int>(stretches), stretch};
}

struct Job {
  int64_t tile,
      begin;  // its walkers are order[begin, begin + kMostWalkers), as far as the tile has
};

// What lies in the workspace.
struct Grouping {
  unsigned long long* refused;  // counted from the end, so that 0 is none
  unsigned long long* job_count;
  int64_t* start;  // [units + 1]: the walkers at unit u are order[start[u], start[u + 1])
  Job* jobs;
  uint32_t* rank;   // [walkers]: of each among those at its unit
  uint32_t* order;  // [walkers]
  void* scan;
  size_t scan_bytes, bytes;
};

cudaError_t lay_out(const WalkMatrix& m, int64_t walkers, void* workspace, Grouping* grouping) {
  const int64_t units = m.units();
  const int64_t jobs = (units < walkers ? units : walkers) + walkers / kMostWalkers;
  auto* const words = static_cast<int64_t*>(workspace);
  int64_t used = 0;
  const auto take = [&](int64_t count) {
    used += count;
    return words ? words + used - count : nullptr;
  };
  grouping->refused = reinterpret_cast<unsigned long long*>(take(1));
  grouping->job_count = reinterpret_cast<unsigned long long*>(take(1));
  grouping->start = take(units + 1);
  grouping->jobs = reinterpret_cast<Job*>(take(2 * jobs));
  grouping->rank = reinterpret_cast<uint32_t*>(take(ceil_divide(walkers, 2)));
  grouping->order = reinterpret_cast<uint32_t*>(take(ceil_divide(walkers, 2)));
  grouping->scan = take(0);
  grouping->scan_bytes = 0;
  int64_t* const none = nullptr;
  const cudaError_t error =
      cub::DeviceScan::ExclusiveSum(nullptr, grouping->scan_bytes, none, none, units + 1);
  grouping->bytes = static_cast<size_t>(used) * sizeof(int64_t) + grouping->scan_bytes;
  return error;
}

// ---- grouping -----------------------------------------------------------------------------------

// How many walkers are at each unit. The lanes whose walkers are at the same one add up first:
// where there are few units, their counts would have to wait for each other.
__global__ void __launch_bounds__(kThreads)
    count_walkers(const int64_t* units, const int64_t count, const int64_t unit_count,
                  const Grouping to) {
  const int lane = lane_of_thread();
  for (int64_t i = thread_of_grid(); i - lane < count; i += threads_of_grid()) {
    int64_t unit = i < count ? units[i] : -1;
    if (unit < 0 || unit >= unit_count) {
      if (i < count) atomicMax(to.refused, static_cast<unsigned long long>(count - i));
      unit = -1;
    }
    const uint32_t same = __match_any_sync(kAllLanes, unit);
    const int leader = __ffs(static_cast<int>(same)) - 1;
    unsigned long long first = 0;
    if (unit >= 0 && lane == leader) {
      first = atomicAdd(reinterpret_cast<unsigned long long*>(to.start + unit),
                        static_cast<unsigned long long>(__popc(same)));
    }
    first = __shfl_sync(kAllLanes, first, leader);
    if (unit < 0) continue;
    to.rank[i] = static_cast<uint32_t>(first) +
                 static_cast<uint32_t>(__popc(same & ((uint32_t{1} << lane) - 1)));
  }
}

__global__ void __launch_bounds__(kThreads)
    place_walkers(const int64_t* units, const int64_t count, const Grouping to) {
  for (int64_t i = thread_of_grid(); i < count; i += threads_of_grid()) {
    to.order[to.start[units[i]] + to.rank[i]] = static_cast<uint32_t>(i);
  }
}

// The jobs, in about the order of their units, so that those that run at once are neighbours.
__global__ void __launch_bounds__(kThreads)
    list_jobs(const Cut cut, const int64_t tiles, const Grouping to) {
  const int lane = lane_of_thread();
  for (int64_t n = thread_of_grid(); n - lane < tiles; n += threads_of_grid()) {
    int64_t begin = 0, jobs = 0;
    if (n < tiles) {
      const int64_t first = cut.first_unit(n);
      begin = to.start[first];
      jobs = ceil_divide(to.start[first + cut.units_of(n)] - begin, kMostWalkers);
    }
    int64_t all;
    const int64_t before = warp_sum_before(jobs, lane, &all);
    unsigned long long first = 0;
    if (lane == 0 && all) first = atomicAdd(to.job_count, static_cast<unsigned long long>(all));
    first = __shfl_sync(kAllLanes, first, 0);
    for (int64_t j = 0; j < jobs; ++j) {
      to.jobs[static_cast<int64_t>(first) + before + j] = {n, begin + j * kMostWalkers};
    }
  }
}

// ---- moving -------------------------------------------------------------------------------------

// The candidates of a unit.
template <typename W>
struct Candidates {
  const W* first;
  int64_t stride, entries;
  int64_t first_target;

  __device__ Candidates(const WalkMatrix& m, int64_t unit)
      : first(static_cast<const W*>(m.values) + m.first(unit)),
        stride(m.stride()),
        entries(m.entries),
        first_target(m.group_of(unit) * m.candidates()) {}

  __device__ const W* entries_of(int64_t i) const { return first + i * stride; }
  __device__ double times_gain(const WalkRule& rule, int64_t i, double sum) const {
    return rule.gain ? times(sum, rule.gain[first_target + i]) : sum;
  }
};

// Calls visit(weight) for candidate `begin`, the one `apart` further on, ... as far as `end`; for
// what stands in for them if all are zero. kSingle: they are one entry each, which may be drawn.
template <bool kSingle, typename W, typename Visit>
__device__ __forceinline__ void visit_weights(const Candidates<W>& from, const WalkRule& rule,
                                              bool are_zero, int64_t begin, int64_t end, int apart,
                                              const Visit& visit) {
  if (are_zero) {
    for (int64_t i = begin; i < end; i += apart) {
      visit(uniform_weight(rule, from.first_target + i, from.entries));
    }
    return;
  }
  if constexpr (kSingle) {
    const W* at = from.entries_of(begin);
    for (int64_t i = begin; i < end; i += kAhead * apart) {
      const int64_t left = end - i;
      W values[kAhead];
#pragma unroll
      for (int k = 0; k < kAhead; ++k) {
        values[k] = k * apart < left ? *at : W{};
        at += apart * from.stride;
      }
#pragma unroll
      for (int k = 0; k < kAhead; ++k) {
        if (k * apart >= left) break;
        const double weight = walk_weight(static_cast<double>(widen(values[k])), rule.power);
        visit(from.times_gain(rule, i + k * apart, weight));
      }
    }
  } else {
    for (int64_t i = begin; i < end; i += apart) {
      visit(from.times_gain(rule, i, candidate_weight(from.entries_of(i), from.entries, rule)));
    }
  }
}

struct Table {
  uint64_t sums[kSums];                    // a unit's lie side by side, inclusive
  unsigned long long largest[kMostUnits];  // the bits of the largest weight
  unsigned long long uniform[kMostUnits];  // those of the largest uniform weight, if that is 0
  unsigned long long rough_sum[kMostUnits];
  int scale[kMostUnits];
  uint64_t warp_sums[kStepWarps];
};

// Over the lanes that are at the same unit of a tile.
template <typename T, typename Both>
__device__ __forceinline__ T over_candidates(T value, int tile, const Both& both) {
  for (int apart = kLanes / 2; apart >= tile; apart /= 2) {
    value = both(value, __shfl_xor_sync(kAllLanes, value, apart));
  }
  return value;
}

// Sums up each unit's stretches, in place. A thread takes an odd number of them, so that a warp's
// lanes meet in no bank of the shared memory.
__device__ __forceinline__ void sum_up(Table& table, const Cut& cut) {
  const int thread = static_cast<int>(threadIdx.x), lane = lane_of_thread();
  const int threads = kStepThreads / cut.tile, warps = kStepWarps / cut.tile;  // of a unit
  const int unit = thread / threads;
  const int each = (cut.stretches + threads - 1) / threads | 1;
  uint64_t* const sums = table.sums + unit * cut.stretches;
  const int begin = thread % threads * each;
  const int end = begin + each < cut.stretches ? begin + each : cut.stretches;
  uint64_t own = 0;
  for (int i = begin; i < end; ++i) own += sums[i];
  uint64_t of_warp;
  uint64_t sum = warp_sum_before(own, lane, &of_warp);
  if (lane == 0) table.warp_sums[warp_of_block()] = of_warp;
  __syncthreads();
  for (int w = unit * warps; w < warp_of_block(); ++w) sum += table.warp_sums[w];
  for (int i = begin; i < end; ++i) sums[i] = sum += sums[i];
}

// Makes the tables of a tile's units that have walkers.
template <bool kSingle, typename W>
__device__ __forceinline__ void make_table(const WalkMatrix& m, const WalkRule& rule,
                                           const Cut& cut, const int64_t* start, int64_t tile,
                                           Table& table) {
  const int thread = static_cast<int>(threadIdx.x), lane = lane_of_thread();
  const int place = thread % cut.tile;  // neighbours are at neighbouring units
  const int row = thread / cut.tile, rows = kStepThreads / cut.tile;
  const int64_t first_unit = cut.first_unit(tile);
  const bool is_busy =
      place < cut.units_of(tile) && start[first_unit + place] < start[first_unit + place + 1];
  const Candidates<W> candidates(m, first_unit + (is_busy ? place : 0));
  const int64_t count = is_busy ? m.candidates() : 0;
  if (thread < kMostUnits) {
    table.largest[thread] = 0;
    table.uniform[thread] = 0;
    table.rough_sum[thread] = 0;
  }
  __syncthreads();

  double largest = 0;
  visit_weights<kSingle>(candidates, rule, false, row, count, rows, [&](double weight) {
    if (weight > largest) largest = weight;
  });
  largest = over_candidates(largest, cut.tile, [](double a, double b) { return a > b ? a : b; });
  if (lane < cut.tile) {
    atomicMax(&table.largest[place], bit_cast<unsigned long long>(largest));
  }
  __syncthreads();

  const bool are_zero = table.largest[place] == 0;
  if (are_zero) {
    double uniform = 0;
    visit_weights<kSingle>(candidates, rule, true, row, count, rows, [&](double weight) {
      if (weight > uniform) uniform = weight;
    });
    atomicMax(&table.uniform[place], bit_cast<unsigned long long>(uniform));
  }
  __syncthreads();

  const unsigned long long bits = are_zero ? table.uniform[place] : table.largest[place];
  const int64_t summed = bits ? count : 0;
  const int rough = bits ? rough_scale(m.candidates(), exponent_of(bit_cast<double>(bits))) : 0;
  uint64_t sum = 0;
  visit_weights<kSingle>(candidates, rule, are_zero, row, summed, rows,
                         [&](double weight) { sum += scaled_integer(weight, rough, 0); });
  sum = over_candidates(sum, cut.tile, [](uint64_t a, uint64_t b) { return a + b; });
  if (lane < cut.tile) {
    atomicAdd(&table.rough_sum[place], static_cast<unsigned long long>(sum));
  }
  __syncthreads();

  const int scale = final_scale(m.candidates(), rough, table.rough_sum[place]);
  if (row == 0) table.scale[place] = scale;
  for (int s = row; s < cut.stretches; s += rows) {
    const int64_t begin = s * cut.stretch;
    const int64_t end = begin + cut.stretch < summed ? begin + cut.stretch : summed;
    uint64_t of_stretch = 0;
    visit_weights<kSingle>(candidates, rule, are_zero, begin, end, 1,
                           [&](double weight) { of_stretch += scaled_integer(weight, scale, 1); });
    table.sums[place * cut.stretches + s] = of_stretch;
  }
  __syncthreads();
  sum_up(table, cut);
  __syncthreads();
}

// The candidate that a walker draws from a table.
template <bool kSingle, typename W>
__device__ __forceinline__ int64_t draw_candidate(const WalkMatrix& m, const WalkRule& rule,
                                                  const Cut& cut, const Table& table, int place,
                                                  const Candidates<W>& candidates, int64_t walk) {
  const uint64_t* const sums = table.sums + place * cut.stretches;
  const uint64_t word = walk_word(rule.seed, walk, rule.step, WalkWord::kUnit);
  const uint64_t draw = fixed_draw(word, sums[cut.stretches - 1]);
  const int64_t s = find_in_cdf(sums, cut.stretches, draw);
  const int64_t begin = s * cut.stretch;
  int64_t last = begin + cut.stretch - 1;
  if (last > m.candidates() - 1) last = m.candidates() - 1;
  const bool are_zero = table.largest[place] == 0;
  uint64_t sum = s ? sums[s - 1] : 0;
  int64_t passed = 0;
  // To the end, and not only until the draw is passed, so that loads need not wait for each other.
  visit_weights<kSingle>(candidates, rule, are_zero, begin, last, 1, [&](double weight) {
    sum += scaled_integer(weight, table.scale[place], 1);
    passed += sum <= draw;
  });
  return begin + passed;
}

template <typename W, bool kSingle>
__global__ void __launch_bounds__(kStepThreads, kSingle ? 2 : 1)
    move_walkers(const WalkMatrix m, const WalkRule rule, const Walkers walkers, const Cut cut,
                 const Grouping grouping) {
  __shared__ Table table;
  const auto jobs = static_cast<int64_t>(*grouping.job_count);
  for (int64_t j = blockIdx.x; j < jobs; j += gridDim.x) {
    const Job job = grouping.jobs[j];
    make_table<kSingle, W>(m, rule, cut, grouping.start, job.tile, table);
    const int64_t first_unit = cut.first_unit(job.tile);
    const int64_t of_tile = grouping.start[first_unit + cut.units_of(job.tile)];
    const int64_t end = job.begin + kMostWalkers < of_tile ? job.begin + kMostWalkers : of_tile;
    for (int64_t i = job.begin + threadIdx.x; i < end; i += kStepThreads) {
      const int64_t walker = grouping.order[i];
      const int64_t unit = walkers.units[walker], walk = walkers.walks[walker];
      const int place = static_cast<int>(unit - first_unit);
      int64_t next = -1, edge = -1;
      if (table.largest[place] || table.uniform[place]) {
        const Candidates<W> candidates(m, unit);
        const int64_t chosen =
            draw_candidate<kSingle>(m, rule, cut, table, place, candidates, walk);
        const W* const entries = candidates.entries_of(chosen);
        next = candidates.first_target + chosen;
        edge = entries - static_cast<const W*>(m.values);
        if constexpr (!kSingle) {
          edge += draw_entry(entries, m.entries, rule,
                             walk_word(rule.seed, walk, rule.step, WalkWord::kEntry));
        }
      }
      walkers.next[walker] = next;
      walkers.edge[walker] = edge;
    }
    __syncthreads();  // before the table is made anew
  }
}

}  // namespace

cudaError_t walk_step_bytes(const WalkMatrix& m, int64_t walkers, size_t* bytes) {
  Grouping grouping;
  const cudaError_t error = lay_out(m, walkers, nullptr, &grouping);
  *bytes = grouping.bytes;
  return error;
}

cudaError_t count_walkers_at_units(const WalkMatrix& m, const Walkers& walkers, void* workspace,
                                   cudaStream_t stream) {
  Grouping grouping;
  cudaError_t error = lay_out(m, walkers.count, workspace, &grouping);
  if (error != cudaSuccess) return error;
  const auto zeros = static_cast<size_t>(2 + m.units() + 1) * sizeof(int64_t);
  error = cudaMemsetAsync(workspace, 0, zeros, stream);
  if (error != cudaSuccess) return error;
  return launch(count_walkers, blocks_for(walkers.count, kThreads), kThreads, stream, walkers.units,
                walkers.count, m.units(), grouping);
}

cudaError_t move_counted_walkers(const WalkMatrix& m, const WalkRule& rule, const Walkers& walkers,
                                 void* workspace, cudaStream_t stream) {
  Grouping grouping;
  cudaError_t error = lay_out(m, walkers.count, workspace, &grouping);
  if (error != cudaSuccess) return error;
  error = cub::DeviceScan::ExclusiveSum(grouping.scan, grouping.scan_bytes, grouping.start,
                                        grouping.start, m.units() + 1, stream);
  if (error != cudaSuccess) return error;
  error = launch(place_walkers, blocks_for(walkers.count, kThreads), kThreads, stream,
                 walkers.units, walkers.count, grouping);
  if (error != cudaSuccess) return error;
  return by_storage(m.storage, false, [&]<typename W, bool kPacked>() {
    const Cut how = cut(m, sizeof(W));
    const int64_t tiles = m.groups * how.tiles_of_group;
    const cudaError_t listed =
        launch(list_jobs, blocks_for(tiles, kThreads), kThreads, stream, how, tiles, grouping);
    if (listed != cudaSuccess) return listed;
    const int64_t jobs =
        (tiles < walkers.count ? tiles : walkers.count) + walkers.count / kMostWalkers;
    const bool is_single = m.entries == 1 && rule.valid == nullptr;
    return launch(is_single ? move_walkers<W, true> : move_walkers<W, false>, blocks_for(jobs, 1),
                  kStepThreads, stream, m, rule, walkers, how, grouping);
  });
}

}  // namespace pathprune::cuda
