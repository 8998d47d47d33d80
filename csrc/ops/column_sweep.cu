// Sums along columns: the transposed flow, and the collection of scores, alone or in the same read.
//
// Bytes: each weight once per chunk of positions (four in float32, one in float64), the mask once;
// sums over 64 rows or more are written and read once, 1/64 of a float32 weight a position.
//
// A block takes one tile of columns over a block of rows; each of its warps takes every eighth of
// these rows and keeps the sums of its columns in registers, so a row is read as 512 adjacent bytes
// a load. The warps' sums are added in their order in shared memory, and those of the row blocks by
// a second kernel, in theirs: floating-point atomics would make the result depend on luck.
//
// Scores inside the bracket wait in shared memory until a warp has many of them: the cursor of the
// result is one word of memory that all warps of the GPU meet at.

#include "core/float_key.h"
#include "ops/kernels_cuda.h"
#include "ops/tile_weights_cuda.h"

namespace pathprune::cuda {
namespace {

using Count = unsigned long long;  // what atomics take

template <typename A>
struct ColumnFlow {
  WeightMap f;
  const A* in;  // [groups, positions, rows]
  A* sums;      // [groups, row blocks, positions, columns]
  int64_t positions;
};

template <typename A>
struct Collection {
  Scoring<A> score;
  Bracket<A> bracket;
  A* values;  // [capacity]
  int64_t capacity;
  Count* counts;    // [4]: above, inside, not finite, live
  Count* extremes;  // [2]: the keys of the smallest and the largest score inside
};

// What the warps of a block have found, in shared memory; extremes as keys.
struct Tally {
  Count above, not_finite, live, least, largest;
};

// What one warp has found and not yet told.
template <typename A>
struct Found {
  static constexpr int kRoom = kTileColumns * 8 / static_cast<int>(sizeof(A));  // 4 KB

  A* waiting;  // [kRoom] in shared memory: scores inside
  int held = 0;
  uint32_t above = 0, not_finite = 0, live = 0;  // of this lane
};

// Appends what is waiting to the values. All that is inside comes through here, so the extremes are
// taken here, where there is little, and not where all the weights pass.
template <typename A>
__device__ __forceinline__ void write_out(const Collection<A>& to, Tally& tally, Found<A>& found,
                                          int lane) {
  __syncwarp();
  Count place = 0;
  if (lane == 0 && found.held > 0) place = atomicAdd(&to.counts[1], Count(found.held));
  const int64_t first = static_cast<int64_t>(__shfl_sync(kAllLanes, place, 0));
  if (lane < found.held) {
    A least = found.waiting[lane], largest = least;
    for (int i = lane; i < found.held; i += kLanes) {
      const A v = found.waiting[i];
      least = v < least ? v : least;
      largest = v > largest ? v : largest;
      if (first + i < to.capacity) to.values[first + i] = v;
    }
    atomicMin(&tally.least, Count(float_key(static_cast<double>(least))));
    atomicMax(&tally.largest, Count(float_key(static_cast<double>(largest))));
  }
  __syncwarp();
  found.held = 0;
}

template <typename A>
__device__ __forceinline__ void collect(const Collection<A>& to, Tally& tally, Found<A>& found,
                                        int lane, uint32_t live, const A (&v)[kLaneColumns]) {
  uint32_t inside = 0;
#pragma unroll
  for (int i = 0; i < kLaneColumns; ++i) {
    // NaN for what is not live: it is neither above nor inside, so the comparisons need no more.
    const A score = live >> i & 1 ? v[i] : static_cast<A>(NAN);
    found.above += to.bracket.is_passed_by(score);
    found.not_finite += !is_finite(score);
    inside |= static_cast<uint32_t>(to.bracket.holds(score)) << i;
  }
  found.live += __popc(live);
  found.not_finite -= kLaneColumns - __popc(live);
  int total;
  int place = warp_sum_before(__popc(inside), lane, &total);
  if (total == 0) return;
  if (found.held + total > Found<A>::kRoom) write_out(to, tally, found, lane);
  place += found.held;
#pragma unroll
  for (int i = 0; i < kLaneColumns; ++i) {
    if (inside >> i & 1) found.waiting[place++] = v[i];
  }
  found.held += total;
}

// Adds what the warps found to the block's tally, and that to the result.
template <typename A>
__device__ __forceinline__ void tell(const Collection<A>& to, Tally& tally, Found<A>& found,
                                     int lane) {
  write_out(to, tally, found, lane);
  const Count above = warp_sum(Count(found.above));
  const Count not_finite = warp_sum(Count(found.not_finite));
  const Count live = warp_sum(Count(found.live));
  if (lane == 0) {
    atomicAdd(&tally.above, above);
    atomicAdd(&tally.not_finite, not_finite);
    atomicAdd(&tally.live, live);
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    if (tally.above) atomicAdd(&to.counts[0], tally.above);
    if (tally.not_finite) atomicAdd(&to.counts[2], tally.not_finite);
    if (tally.live) atomicAdd(&to.counts[3], tally.live);
    atomicMin(&to.extremes[0], tally.least);
    atomicMax(&to.extremes[1], tally.largest);
  }
}

// Where a block of the grid works.
struct Part {
  int64_t group, row_block, tile;
  int64_t row_begin, row_end;
};

__device__ __forceinline__ Part part_of(const TiledWeights& w, int64_t index) {
  const int64_t blocks = blocks_of_rows(w.all.rows);
  Part part;
  part.tile = index % w.tiles;
  part.row_block = index / w.tiles % blocks;
  part.group = index / w.tiles / blocks;
  part.row_begin = part.row_block * rows_of_block(w.all.rows);
  const int64_t end = part.row_begin + rows_of_block(w.all.rows);
  part.row_end = end < w.all.rows ? end : w.all.rows;
  return part;
}

// Adds a row's part of the sums, for positions t, t + 1, ..
template <int kPositions, typename W, typename A>
__device__ __forceinline__ void add_row(const TiledWeights& w, const ColumnFlow<A>& flow,
                                        int64_t group, int64_t row, int64_t t, uint32_t live,
                                        const W (&value)[kLaneColumns],
                                        A (&sum)[kPositions][kLaneColumns]) {
  const AnyMap<A> f(flow.f);
#pragma unroll
  for (int p = 0; p < kPositions; ++p) {
    if (t + p >= flow.positions) break;
    const A g = flow.in[(group * flow.positions + t + p) * w.all.rows + row];
#pragma unroll
    for (int i = 0; i < kLaneColumns; ++i) {
      if (live >> i & 1) sum[p][i] += f(widen(value[i])) * g;
    }
  }
}

template <int kPerVector, int kPositions, typename A>
__device__ __forceinline__ void write_sums(const TiledWeights& w, const ColumnFlow<A>& flow,
                                           const Part& part, int64_t t, int lane, int warp,
                                           const A (&sum)[kPositions][kLaneColumns],
                                           A (&total)[kPositions][kTileColumns]) {
  for (int turn = 0; turn < kWarps; ++turn) {
    if (warp == turn) {
#pragma unroll
      for (int p = 0; p < kPositions; ++p) {
#pragma unroll
        for (int i = 0; i < kLaneColumns; ++i) {
          A& place = total[p][lane_column(kPerVector, lane, i)];
          place = turn == 0 ? sum[p][i] : place + sum[p][i];
        }
      }
    }
    __syncthreads();
  }
  const int64_t first = (part.group * blocks_of_rows(w.all.rows) + part.row_block) * flow.positions;
  for (int i = static_cast<int>(threadIdx.x); i < kPositions * kTileColumns; i += kThreads) {
    const int p = i / kTileColumns;
    const int64_t column = part.tile * kTileColumns + i % kTileColumns;
    if (t + p < flow.positions && column < w.all.columns) {
      flow.sums[(first + t + p) * w.all.columns + column] = total[p][i % kTileColumns];
    }
  }
  __syncthreads();
}

// kOne: all flows have one position, but those of the flow may have none.
template <typename W, bool kPacked, bool kOne, bool kCollect>
__global__ void __launch_bounds__(kThreads, kOne && sizeof(W) <= 4 ? 2 : 1)
    sweep_columns(const TiledWeights w, const ColumnFlow<Accumulate<W>> flow,
                  const Collection<Accumulate<W>> collection, const int64_t parts) {
  using A = Accumulate<W>;
  // As many sums as registers hold.
  constexpr int kPositions = kOne || sizeof(A) == 8 ? 1 : 4;
  __shared__ A total[kPositions][kTileColumns];
  __shared__ A waiting[kCollect ? kWarps : 1][kCollect ? Found<A>::kRoom : 1];
  __shared__ Tally tally;
  const int lane = lane_of_thread(), warp = warp_of_block();
  Found<A> found;
  found.waiting = waiting[kCollect ? warp : 0];
  if constexpr (kCollect) {
    if (threadIdx.x == 0) tally = {0, 0, 0, ~Count{0}, 0};
    __syncthreads();
  }
  for (int64_t index = blockIdx.x; index < parts; index += gridDim.x) {
    const Part part = part_of(w, index);
    A x[kLaneColumns];
    if constexpr (kCollect && kOne) {
      load_only_flow<kVector<W>>(collection.score, w.all, part.group, part.tile, lane, x);
    }
    int64_t t = 0;
    do {
      A sum[kPositions][kLaneColumns] = {};
#pragma unroll 1
      for (int64_t row = part.row_begin + warp; row < part.row_end; row += kWarps) {
        const int64_t flat_row = part.group * w.all.rows + row;
        const uint32_t word = word_of_lane(w.all.mask, w.all, flat_row, part.tile, lane);
        W value[kLaneColumns];
        const uint32_t live = load_tile<W, kPacked>(w, flat_row, part.tile, lane, word, value);
        add_row(w, flow, part.group, row, t, live, value, sum);
        if constexpr (kCollect) {
          A v[kLaneColumns];
          if constexpr (kOne) {
            score_with(collection.score, w.all, part.group, row, x, value, v);
            collect(collection, tally, found, lane, live, v);
          } else if (t == 0) {
            score_tile(collection.score, w.all, part.group, row, part.tile, lane, value, v);
            collect(collection, tally, found, lane, live, v);
          }
        }
      }
      if (flow.positions > 0) {
        write_sums<kVector<W>>(w, flow, part, t, lane, warp, sum, total);
      }
      t += kPositions;
    } while (!kOne && t < flow.positions);
  }
  if constexpr (kCollect) tell(collection, tally, found, lane);
}

// out[g, t, c] = the sum over row blocks, in their order.
template <typename A>
__global__ void __launch_bounds__(kThreads, 1)
    add_row_blocks(const A* sums,  // [groups, blocks, flows of a group]
                   const int64_t groups, const int64_t blocks, const int64_t flows,
                   A* out) {  // [groups, flows]
  for (int64_t i = thread_of_grid(); i < groups * flows; i += threads_of_grid()) {
    const int64_t group = i / flows, place = i % flows;
    A total = A(0);
    for (int64_t b = 0; b < blocks; ++b) total += sums[(group * blocks + b) * flows + place];
    out[i] = total;
  }
}

template <typename W, bool kPacked, bool kCollect>
cudaError_t sweep(const TiledWeights& w, const ColumnFlow<Accumulate<W>>& flow,
                  const Collection<Accumulate<W>>& collection, bool is_one, cudaStream_t stream) {
  const int64_t parts = w.all.groups * blocks_of_rows(w.all.rows) * w.tiles;
  const int64_t blocks = blocks_of_grid(parts);
  if (is_one && flow.positions <= 1) {
    return launch(sweep_columns<W, kPacked, true, kCollect>, blocks, kThreads, stream, w, flow,
                  collection, parts);
  }
  return launch(sweep_columns<W, kPacked, false, kCollect>, blocks, kThreads, stream, w, flow,
                collection, parts);
}

template <typename W, bool kPacked, bool kCollect>
cudaError_t sweep_and_add(const StoredWeights& stored, const Flow& flow,
                          const Collection<Accumulate<W>>& collection, bool is_one, void* sums,
                          cudaStream_t stream) {
  using A = Accumulate<W>;
  const TiledWeights w = tiled<W>(stored);
  const bool is_split = column_sum_count(w.all, flow.positions) > 0;
  A* const out = static_cast<A*>(flow.out);
  const ColumnFlow<A> column_flow = {flow.f, static_cast<const A*>(flow.in),
                                     is_split ? static_cast<A*>(sums) : out, flow.positions};
  const cudaError_t error = sweep<W, kPacked, kCollect>(w, column_flow, collection, is_one, stream);
  if (error != cudaSuccess || !is_split) return error;
  const int64_t flows = flow.positions * w.all.columns;
  return launch(add_row_blocks<A>, blocks_for(w.all.groups * flows, kThreads), kThreads, stream,
                static_cast<const A*>(sums), w.all.groups, blocks_of_rows(w.all.rows), flows, out);
}

__global__ void begin_extremes(Count* extremes) {
  if (threadIdx.x == 0) extremes[0] = float_key(static_cast<double>(INFINITY));
  if (threadIdx.x == 1) extremes[1] = float_key(-static_cast<double>(INFINITY));
}

// From keys to the numbers themselves, in place.
__global__ void end_extremes(Count* extremes) {
  if (threadIdx.x < 2) {
    extremes[threadIdx.x] = bit_cast<Count>(float_of_key<double>(extremes[threadIdx.x]));
  }
}

}  // namespace

int64_t column_sum_count(const Weights& w, int64_t positions) {
  const int64_t blocks = blocks_of_rows(w.rows);
  return blocks > 1 ? w.groups * blocks * positions * w.columns : 0;
}

cudaError_t flow_by_columns(const StoredWeights& w, const Flow& flow, void* sums,
                            cudaStream_t stream) {
  if (flow.positions == 0) return cudaSuccess;
  return by_storage(w.all.storage, w.packed(), [&]<typename W, bool kPacked>() {
    return sweep_and_add<W, kPacked, false>(w, flow, Collection<Accumulate<W>>{}, true, sums,
                                            stream);
  });
}

cudaError_t collect_by_columns(const StoredWeights& w, const Score& score,
                               const Collected& collected, const Flow& flow, void* sums,
                               cudaStream_t stream) {
  cudaError_t error = cudaMemsetAsync(collected.counts, 0, 4 * sizeof(int64_t), stream);
  if (error != cudaSuccess) return error;
  Count* const extremes = reinterpret_cast<Count*>(collected.extremes);
  error = launch(begin_extremes, 1, kLanes, stream, extremes);
  if (error != cudaSuccess) return error;
  error = by_storage(w.all.storage, w.packed(), [&]<typename W, bool kPacked>() {
    using A = Accumulate<W>;
    const Collection<A> collection = {scoring<A>(score, w.all.columns),
                                      {static_cast<A>(collected.lo), static_cast<A>(collected.hi)},
                                      static_cast<A*>(collected.values),
                                      collected.capacity,
                                      reinterpret_cast<Count*>(collected.counts),
                                      extremes};
    return sweep_and_add<W, kPacked, true>(w, flow, collection, has_one_position(score), sums,
                                           stream);
  });
  if (error != cudaSuccess) return error;
  return launch(end_extremes, 1, kLanes, stream, extremes);
}

}  // namespace pathprune::cuda
