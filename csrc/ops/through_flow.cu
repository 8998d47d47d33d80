// Scores alone: written out, counted by their leading bits, and looked up by their place.
//
// Every pass reads each weight and its mask bit once and computes the scores anew; only
// write_scores writes as much as that. A warp takes one tile after another: its loads are 512
// adjacent bytes each.

#include "core/float_key.h"
#include "ops/kernels_cuda.h"
#include "ops/tile_weights_cuda.h"

namespace pathprune::cuda {
namespace {

using Count = unsigned long long;  // what atomics take

// Loads a tile of all tiles and scores it: returns which of the lane's columns are live. `keep`:
// the columns of the lane's word to look at.
template <typename W, bool kPacked>
__device__ __forceinline__ uint32_t score_tile_at(const TiledWeights& w,
                                                  const Scoring<Accumulate<W>>& score,
                                                  int64_t flat_row, int64_t tile, int lane,
                                                  uint32_t keep, Accumulate<W> (&v)[kLaneColumns]) {
  const int64_t group = flat_row / w.all.rows, row = flat_row % w.all.rows;
  const uint32_t word = keep & word_of_lane(w.all.mask, w.all, flat_row, tile, lane);
  W value[kLaneColumns];
  const uint32_t live = load_tile<W, kPacked>(w, flat_row, tile, lane, word, value);
  score_tile(score, w.all, group, row, tile, lane, value, v);
  return live;
}

// Bytes: the weight and its bit in, the score out.
template <typename W, bool kPacked>
__global__ void __launch_bounds__(kThreads)
    write_tiles(const TiledWeights w, const Scoring<Accumulate<W>> score,
                Accumulate<W>* scores,  // [groups, rows, columns]
                const bool vectors) {
  using A = Accumulate<W>;
  const int lane = lane_of_thread();
  for (int64_t n = warp_of_grid(); n < w.flat_rows() * w.tiles; n += warps_of_grid()) {
    const int64_t flat_row = n / w.tiles, tile = n % w.tiles;
    A v[kLaneColumns];
    const uint32_t live = score_tile_at<W, kPacked>(w, score, flat_row, tile, lane, 0xFFFFu, v);
    A* const row = scores + flat_row * w.all.columns;
#pragma unroll
    for (int i = 0; i < kLaneColumns; i += kVector<A>) {
      const int64_t column = tile * kTileColumns + lane_column(kVector<W>, lane, i);
      Vector<A> vector;
#pragma unroll
      for (int e = 0; e < kVector<A>; ++e) {
        vector.item[e] = live >> (i + e) & 1 ? v[i + e] : A(0);
      }
      if (vectors) {
        if (column < w.all.columns) *reinterpret_cast<Vector<A>*>(row + column) = vector;
      } else {
#pragma unroll
        for (int e = 0; e < kVector<A>; ++e) {
          if (column + e < w.all.columns) row[column + e] = vector.item[e];
        }
      }
    }
  }
}

// The bins are 1 MB or 8 MB of counters, too many for shared memory, so they stay in L2. Scores
// crowd into few bins - ties, or the zeros of a dead unit - so lanes that meet in a bin are counted
// together and one of them adds; without that, one bin of zeros would serialise the whole GPU.
template <typename W, bool kPacked>
__global__ void __launch_bounds__(kThreads)
    count_tiles(const TiledWeights w, const Scoring<Accumulate<W>> score, const int64_t stride,
                Count* histogram,
                Count* counts) {  // [2]: visited, not finite
  using A = Accumulate<W>;
  constexpr uint32_t kNoBin = 0xFFFFFFFFu;
  const int lane = lane_of_thread();
  uint32_t visited = 0, not_finite = 0;  // of this lane
  for (int64_t n = warp_of_grid(); n < w.flat_rows() * w.tiles; n += warps_of_grid()) {
    const int64_t flat_row = n / w.tiles, tile = n % w.tiles;
    const int64_t word = flat_row * w.all.words + tile * kTileWords + lane;
    const uint32_t keep = word % stride == 0 ? 0xFFFFu : 0;
    if (!__any_sync(kAllLanes, keep != 0)) continue;
    A v[kLaneColumns];
    const uint32_t live = score_tile_at<W, kPacked>(w, score, flat_row, tile, lane, keep, v);
    visited += __popc(live);
#pragma unroll
    for (int i = 0; i < kLaneColumns; ++i) {
      const bool is_live = live >> i & 1, finite = is_finite(v[i]);
      not_finite += is_live && !finite;
      const uint32_t bin = is_live && finite ? float_bin(v[i]) : kNoBin;
      const uint32_t together = __match_any_sync(kAllLanes, bin);
      const bool is_first = bits_before(together, lane) == 0;
      if (bin != kNoBin && is_first) atomicAdd(&histogram[bin], Count(__popc(together)));
    }
  }
  const Count all_visited = warp_sum(Count(visited));
  const Count all_not_finite = warp_sum(Count(not_finite));
  if (lane == 0 && all_visited) atomicAdd(&counts[0], all_visited);
  if (lane == 0 && all_not_finite) atomicAdd(&counts[1], all_not_finite);
}

// ---- the n-th of the scores in a span -----------------------------------------------------------

template <typename A>
struct Span {
  Scoring<A> score;
  A at_least, above;  // at_least <= v < above
};

// The lane's columns of tile n of all tiles that are live and inside the span.
template <typename W, bool kPacked>
__device__ __forceinline__ uint32_t find_inside(const TiledWeights& w,
                                                const Span<Accumulate<W>>& span, int64_t n,
                                                int lane) {
  Accumulate<W> v[kLaneColumns];
  const uint32_t live =
      score_tile_at<W, kPacked>(w, span.score, n / w.tiles, n % w.tiles, lane, 0xFFFFu, v);
  uint32_t inside = 0;
#pragma unroll
  for (int i = 0; i < kLaneColumns; ++i) {
    const bool is_inside = v[i] >= span.at_least && v[i] < span.above;
    inside |= static_cast<uint32_t>(is_inside) << i;
  }
  return inside & live;
}

// Each warp counts one chunk of tiles after another.
template <typename W, bool kPacked>
__global__ void __launch_bounds__(kThreads)
    count_chunks(const TiledWeights w, const Span<Accumulate<W>> span, const int64_t chunks,
                 int64_t* counts) {  // [chunks]
  const int lane = lane_of_thread();
  const int64_t tiles = w.flat_rows() * w.tiles;
  for (int64_t chunk = warp_of_grid(); chunk < chunks; chunk += warps_of_grid()) {
    const int64_t end = chunk_begin(tiles, chunks, chunk + 1);
    int64_t count = 0;
    for (int64_t n = chunk_begin(tiles, chunks, chunk); n < end; ++n) {
      count += __popc(find_inside<W, kPacked>(w, span, n, lane));
    }
    count = warp_sum(count);
    if (lane == 0) counts[chunk] = count;
  }
}

// Where among counts[0 .. size) the n-th of what they count is, and how many of its place come
// before it: every lane sums a stretch of the counts, the lane whose stretch it is looks closer.
// Place `size` if there are not so many.
__device__ __forceinline__ int64_t find_place(const int64_t* counts, int64_t size, int64_t* n,
                                              int lane) {
  const int64_t begin = chunk_begin(size, kLanes, lane), end = chunk_begin(size, kLanes, lane + 1);
  int64_t mine = 0;
  for (int64_t i = begin; i < end; ++i) mine += counts[i];
  int64_t total;
  const int64_t before = warp_sum_before(mine, lane, &total);
  if (*n >= total) return size;
  const bool is_here = *n >= before && *n < before + mine;
  const int finder = __ffs(static_cast<int>(__ballot_sync(kAllLanes, is_here))) - 1;
  int64_t place = begin, left = *n - before;
  if (is_here) {
    while (left >= counts[place]) left -= counts[place++];
  }
  *n = __shfl_sync(kAllLanes, left, finder);
  return __shfl_sync(kAllLanes, place, finder);
}

// If the n-th of what is inside lies in this tile, writes its flat index; else takes those that do
// from n. Vectors in turn, in each the lanes in turn: the order of the columns.
template <typename W>
__device__ __forceinline__ bool find_in_tile(const TiledWeights& w, int64_t tile_of_all,
                                             uint32_t inside, int lane, int64_t* n,
                                             int64_t* index) {
  constexpr int kPerVector = kVector<W>;
  const int64_t flat_row = tile_of_all / w.tiles, tile = tile_of_all % w.tiles;
#pragma unroll
  for (int i = 0; i < kLaneColumns; i += kPerVector) {
    const uint32_t bits = bits_before(inside >> i, kPerVector);
    int total;
    const int before = warp_sum_before(__popc(bits), lane, &total);
    if (*n < total) {
      const int64_t first = flat_row * w.all.columns + tile * kTileColumns;
#pragma unroll
      for (int e = 0; e < kPerVector; ++e) {
        const bool is_it = bits >> e & 1 && before + __popc(bits_before(bits, e)) == *n;
        if (is_it) *index = first + lane_column(kPerVector, lane, i + e);
      }
      return true;
    }
    *n -= total;
  }
  return false;
}

// One block. Its warps cut the chunk that holds the n-th once more, and the one whose part it is in
// goes through it tile by tile.
template <typename W, bool kPacked>
__global__ void __launch_bounds__(kThreads, 1)
    find_in_chunks(const TiledWeights w, const Span<Accumulate<W>> span, const int64_t chunks,
                   const int64_t* counts, const int64_t nth,
                   int64_t* index) {  // []
  __shared__ int64_t part_counts[kWarps];
  const int lane = lane_of_thread(), warp = warp_of_block();
  const int64_t tiles = w.flat_rows() * w.tiles;
  int64_t n = nth;
  const int64_t chunk = find_place(counts, chunks, &n, lane);  // the same in every warp
  if (chunk == chunks) {
    if (threadIdx.x == 0) *index = w.flat_rows() * w.all.columns;
    return;
  }
  const int64_t first = chunk_begin(tiles, chunks, chunk);
  const int64_t size = chunk_begin(tiles, chunks, chunk + 1) - first;
  const int64_t begin = first + chunk_begin(size, kWarps, warp);
  const int64_t end = first + chunk_begin(size, kWarps, warp + 1);
  int64_t count = 0;
  for (int64_t tile = begin; tile < end; ++tile) {
    count += __popc(find_inside<W, kPacked>(w, span, tile, lane));
  }
  count = warp_sum(count);
  if (lane == 0) part_counts[warp] = count;
  __syncthreads();
  for (int before = 0; before < warp; ++before) n -= part_counts[before];
  if (n < 0 || n >= count) return;
  for (int64_t tile = begin; tile < end; ++tile) {
    const uint32_t inside = find_inside<W, kPacked>(w, span, tile, lane);
    if (find_in_tile<W>(w, tile, inside, lane, &n, index)) return;
  }
}

__global__ void write_one(int64_t* place, int64_t value) { *place = value; }

}  // namespace

cudaError_t write_scores(const StoredWeights& stored, const Score& score, void* scores,
                         cudaStream_t stream) {
  return by_storage(stored.all.storage, stored.packed(), [&]<typename W, bool kPacked>() {
    using A = Accumulate<W>;
    const TiledWeights w = tiled<W>(stored);
    return launch(write_tiles<W, kPacked>, blocks_for(w.flat_rows() * w.tiles, kWarps), kThreads,
                  stream, w, scoring<A>(score, w.all.columns), static_cast<A*>(scores),
                  has_vectors<A>(scores, w.all.columns));
  });
}

cudaError_t count_by_bin(const StoredWeights& stored, const Score& score, int64_t stride,
                         int64_t* histogram, int64_t* counts, cudaStream_t stream) {
  const int bits = stored.all.storage == Storage::kFloat64 ? FloatTraits<double>::kBinBits
                                                           : FloatTraits<float>::kBinBits;
  cudaError_t error = cudaMemsetAsync(histogram, 0, sizeof(int64_t) << bits, stream);
  if (error != cudaSuccess) return error;
  error = cudaMemsetAsync(counts, 0, 2 * sizeof(int64_t), stream);
  if (error != cudaSuccess) return error;
  return by_storage(stored.all.storage, stored.packed(), [&]<typename W, bool kPacked>() {
    const TiledWeights w = tiled<W>(stored);
    return launch(count_tiles<W, kPacked>, blocks_for(w.flat_rows() * w.tiles, kWarps), kThreads,
                  stream, w, scoring<Accumulate<W>>(score, w.all.columns), stride,
                  reinterpret_cast<Count*>(histogram), reinterpret_cast<Count*>(counts));
  });
}

int64_t nth_count_count(const Weights& w) {
  return chunks_of_tiles(w.groups * w.rows * tiles_of_row(w.words));
}

cudaError_t find_nth(const StoredWeights& stored, const Score& score, double at_least, double above,
                     int64_t n, int64_t* counts, int64_t* index, cudaStream_t stream) {
  const int64_t chunks = nth_count_count(stored.all);
  if (chunks == 0) return launch(write_one, 1, 1, stream, index, int64_t{0});
  return by_storage(stored.all.storage, stored.packed(), [&]<typename W, bool kPacked>() {
    using A = Accumulate<W>;
    const TiledWeights w = tiled<W>(stored);
    const Span<A> span = {scoring<A>(score, w.all.columns), static_cast<A>(at_least),
                          static_cast<A>(above)};
    const cudaError_t error = launch(count_chunks<W, kPacked>, blocks_for(chunks, kWarps), kThreads,
                                     stream, w, span, chunks, counts);
    if (error != cudaSuccess) return error;
    return launch(find_in_chunks<W, kPacked>, 1, kThreads, stream, w, span, chunks,
                  static_cast<const int64_t*>(counts), n, index);
  });
}

}  // namespace pathprune::cuda
