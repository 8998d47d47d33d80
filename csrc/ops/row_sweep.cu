// Sums along rows: the flow through a layer, and pruning, alone or just before the flow.
//
// Bytes: each weight once per chunk of four positions (chunks after the first find the row in L1 or
// L2), the mask (1/8 byte a weight) once, and once more written where it is pruned. The flows at
// the columns are read anew for every row; a tile's part of them is 2 KB a position and stays in
// L1.
//
// A warp takes whole tiles of a row, so its loads are 512 adjacent bytes each and four of them
// (float32) are on their way at once; the warps of a block take several rows, or share one where
// rows are long. All lanes, then all warps of a row, are added up in a fixed order.

#include <algorithm>

#include "ops/kernels_cuda.h"
#include "ops/tile_weights_cuda.h"

namespace pathprune::cuda {
namespace {

constexpr int kPositionsAtOnce = 4;

template <typename A>
struct RowFlow {
  WeightMap f;
  const A* in;  // [groups, positions, columns]
  A* out;       // [groups, positions, rows]
  int64_t positions;
  bool vectors;
};

template <typename A>
struct Pruning {
  Scoring<A> score;
  Stay<A> stay;
  uint16_t* mask;  // that of the weights
};

// Drops from `live` what does not stay, and writes the new words of the tile.
template <bool kOne, typename W, typename A>
__device__ __forceinline__ uint32_t prune_tile(const TiledWeights& w, const Pruning<A>& pruning,
                                               int64_t group, int64_t row, int64_t tile, int lane,
                                               const W (&value)[kLaneColumns], uint32_t live) {
  A v[kLaneColumns];
  if constexpr (kOne) {
    A x[kLaneColumns];
    load_only_flow<kVector<W>>(pruning.score, w.all, group, tile, lane, x);
    score_with(pruning.score, w.all, group, row, x, value, v);
  } else {
    score_tile(pruning.score, w.all, group, row, tile, lane, value, v);
  }
  const int64_t flat_row = group * w.all.rows + row;
  Stay<A> stay = pruning.stay;
  stay.cut -= flat_row * w.all.columns + tile * kTileColumns;  // counted from the tile's first
  uint32_t stays = 0;
#pragma unroll
  for (int i = 0; i < kLaneColumns; ++i) {
    const bool here = stay(v[i], lane_column(kVector<W>, lane, i));
    stays |= static_cast<uint32_t>(here) << i;
  }
  stays &= live;
  const uint32_t word = word_from_lanes<kVector<W>>(stays, lane);
  const int64_t c = tile * kTileWords + lane;
  if (c < w.all.words) pruning.mask[flat_row * w.all.words + c] = static_cast<uint16_t>(word);
  return stays;
}

// Adds to the lane's sums those of its columns in a tile, for positions t, t + 1, ..
template <int kPositions, typename W, typename A>
__device__ __forceinline__ void add_tile(const TiledWeights& w, const RowFlow<A>& flow,
                                         int64_t group, int64_t t, int64_t tile, int lane,
                                         const W (&value)[kLaneColumns], uint32_t live,
                                         A (&sum)[kPositions]) {
  const AnyMap<A> f(flow.f);
#pragma unroll
  for (int p = 0; p < kPositions; ++p) {
    if (t + p >= flow.positions) break;
    const A* in = flow.in + (group * flow.positions + t + p) * w.all.columns;
    A x[kLaneColumns];
    load_flow<kVector<W>>(in, w.all.columns, tile, lane, flow.vectors, x);
#pragma unroll
    for (int i = 0; i < kLaneColumns; ++i) {
      if (live >> i & 1) sum[p] += f(widen(value[i])) * x[i];
    }
  }
}

// One block: the rows of its warps, `team` warps to a row, kPositions positions at a time. kOne:
// all flows have one position, but those of the flow may have none.
template <typename W, bool kPacked, bool kOne, bool kPrune>
__global__ void __launch_bounds__(kThreads, 1)
    sweep_rows(const TiledWeights w, const RowFlow<Accumulate<W>> flow,
               const Pruning<Accumulate<W>> pruning, const int team) {
  using A = Accumulate<W>;
  constexpr int kPositions = kOne ? 1 : kPositionsAtOnce;
  __shared__ A sums[kWarps][kPositions];
  const int lane = lane_of_thread(), warp = warp_of_block();
  const int rows_at_once = kWarps / team;
  const int64_t rows = w.flat_rows();
  for (int64_t first = blockIdx.x * int64_t{rows_at_once}; first < rows;
       first += gridDim.x * int64_t{rows_at_once}) {
    const int64_t flat_row = first + warp / team;
    const int64_t group = flat_row / w.all.rows, row = flat_row % w.all.rows;
    int64_t t = 0;
    do {
      A sum[kPositions] = {};
#pragma unroll 1
      for (int64_t tile = warp % team; flat_row < rows && tile < w.tiles; tile += team) {
        // Chunks after the first find the words as this very lane wrote them.
        const uint32_t word = word_of_lane(w.all.mask, w.all, flat_row, tile, lane);
        W value[kLaneColumns];
        uint32_t live = load_tile<W, kPacked>(w, flat_row, tile, lane, word, value);
        if (kPrune && t == 0)
          live = prune_tile<kOne>(w, pruning, group, row, tile, lane, value, live);
        add_tile(w, flow, group, t, tile, lane, value, live, sum);
      }
#pragma unroll
      for (int p = 0; p < kPositions; ++p) {
        const A total = warp_sum(sum[p]);
        if (lane == 0) sums[warp][p] = total;
      }
      __syncthreads();
      const int p = static_cast<int>(threadIdx.x) % kPositions;
      const int place = static_cast<int>(threadIdx.x) / kPositions;
      if (place < rows_at_once && first + place < rows && t + p < flow.positions) {
        A total = sums[place * team][p];
        for (int member = 1; member < team; ++member) total += sums[place * team + member][p];
        const int64_t to_group = (first + place) / w.all.rows, to = (first + place) % w.all.rows;
        flow.out[(to_group * flow.positions + t + p) * w.all.rows + to] = total;
      }
      __syncthreads();
      t += kPositions;
    } while (!kOne && t < flow.positions);
  }
}

template <typename W, bool kPacked, bool kPrune>
cudaError_t sweep(const StoredWeights& stored, const Flow& flow,
                  const Pruning<Accumulate<W>>& pruning, bool is_one, cudaStream_t stream) {
  using A = Accumulate<W>;
  const TiledWeights w = tiled<W>(stored);
  const RowFlow<A> row_flow = {flow.f, static_cast<const A*>(flow.in), static_cast<A*>(flow.out),
                               flow.positions, has_vectors<A>(flow.in, w.all.columns)};
  const int team = warps_of_row(w.tiles);
  const int64_t blocks = blocks_of_grid(ceil_divide(w.flat_rows(), kWarps / team));
  if (is_one && flow.positions <= 1) {
    return launch(sweep_rows<W, kPacked, true, kPrune>, blocks, kThreads, stream, w, row_flow,
                  pruning, team);
  }
  return launch(sweep_rows<W, kPacked, false, kPrune>, blocks, kThreads, stream, w, row_flow,
                pruning, team);
}

}  // namespace

cudaError_t flow_by_rows(const StoredWeights& w, const Flow& flow, cudaStream_t stream) {
  if (flow.positions == 0) return cudaSuccess;
  return by_storage(w.all.storage, w.packed(), [&]<typename W, bool kPacked>() {
    return sweep<W, kPacked, false>(w, flow, Pruning<Accumulate<W>>{}, true, stream);
  });
}

cudaError_t prune_by_rows(const StoredWeights& w, const Score& score, double at_least, double above,
                          int64_t cut, uint16_t* mask, const Flow& flow, cudaStream_t stream) {
  // Within the range of indices, so that no difference of the two can overflow.
  cut = std::clamp<int64_t>(cut, 0, w.all.groups * w.all.rows * w.all.columns);
  return by_storage(w.all.storage, w.packed(), [&]<typename W, bool kPacked>() {
    using A = Accumulate<W>;
    const Pruning<A> pruning = {scoring<A>(score, w.all.columns),
                                {static_cast<A>(at_least), static_cast<A>(above), cut},
                                mask};
    return sweep<W, kPacked, true>(w, flow, pruning, has_one_position(score), stream);
  });
}

}  // namespace pathprune::cuda
