// One tile in the registers of a warp: its live weights, the flows at its columns, its scores. Lane
// l's i-th value is the one of column lane_column(.., l, i) of the tile (tile_cuda.h). For .cu
// files.

#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "core/float_key.h"
#include "core/weight_map.h"
#include "ops/kernels_cuda.h"
#include "ops/through_flow.h"
#include "ops/tile_cuda.h"
#include "ops/warp_cuda.h"
#include "ops/weights.h"

namespace pathprune::cuda {

template <typename T>
struct alignas(kVectorBytes) Vector {
  T item[kVector<T>];
};

// Whether every row of `columns` values is made of whole vectors.
template <typename T>
bool has_vectors(const void* first, int64_t columns) {
  return reinterpret_cast<uintptr_t>(first) % kVectorBytes == 0 && columns % kVector<T> == 0;
}

// The weights as an argument of kernels.
struct TiledWeights {
  Weights all;
  const int64_t* tile_start;  // packed: [groups * rows, tiles]: where each tile's values begin
  int64_t tiles;              // of a row
  bool vectors;               // dense: every row is made of whole vectors

  PP_HD int64_t flat_rows() const { return all.groups * all.rows; }
};

template <typename W>
TiledWeights tiled(const StoredWeights& w) {
  return {w.all, w.tile_start, tiles_of_row(w.all.words),
          has_vectors<W>(w.all.values, w.all.columns)};
}

// The lane's word of a tile; bits of columns that do not exist are dropped. Null words: all set.
__device__ __forceinline__ uint32_t word_of_lane(const uint16_t* words, const Weights& w,
                                                 int64_t flat_row, int64_t tile, int lane) {
  const int64_t c = tile * kTileWords + lane;
  if (c >= w.words) return 0;
  const uint32_t word = words == nullptr ? 0xFFFFu : words[flat_row * w.words + c];
  return word & columns_in_word(w.columns, c);
}

// From one word a lane to the bits of the lane's 16 columns, kPerVector to a vector.
template <int kPerVector>
__device__ __forceinline__ uint32_t bits_of_lane(uint32_t word, int lane) {
  uint32_t bits = 0;
#pragma unroll
  for (int i = 0; i < kLaneColumns; i += kPerVector) {
    const int column = lane_column(kPerVector, lane, i);
    const uint32_t of_column = __shfl_sync(kAllLanes, word, column / kWordBits);
    bits |= bits_before(of_column >> (column % kWordBits), kPerVector) << i;
  }
  return bits;
}

// The inverse: from the bits of the lane's columns to the lane's word.
template <int kPerVector>
__device__ __forceinline__ uint32_t word_from_lanes(uint32_t bits, int lane) {
  constexpr int kSharers = kWordBits / kPerVector;  // lanes whose vectors make up a word
  constexpr int kWordsAtOnce = kLanes / kSharers;   // words that one vector a lane makes up
  uint32_t word = 0;
#pragma unroll
  for (int i = 0; i < kLaneColumns; i += kPerVector) {
    uint32_t part = bits_before(bits >> i, kPerVector)
                    << (lane_column(kPerVector, lane, i) % kWordBits);
#pragma unroll
    for (int apart = 1; apart < kSharers; apart *= 2) {
      part |= __shfl_xor_sync(kAllLanes, part, apart);
    }
    const uint32_t whole = __shfl_sync(kAllLanes, part, lane % kWordsAtOnce * kSharers);
    if (lane / kWordsAtOnce == i / kPerVector) word = whole;
  }
  return word;
}

// Vectors without a live weight are not read: at 90 % zeros that is two thirds of them.
template <typename W>
__device__ __forceinline__ void load_dense(const TiledWeights& w, int64_t flat_row, int64_t tile,
                                           int lane, uint32_t live, W (&value)[kLaneColumns]) {
  constexpr int kPerVector = kVector<W>;
  const W* row = static_cast<const W*>(w.all.values) + flat_row * w.all.columns;
#pragma unroll
  for (int i = 0; i < kLaneColumns; i += kPerVector) {
    const W* first = row + tile * kTileColumns + lane_column(kPerVector, lane, i);
    if (w.vectors) {
      Vector<W> vector{};
      if (bits_before(live >> i, kPerVector)) vector = *reinterpret_cast<const Vector<W>*>(first);
#pragma unroll
      for (int e = 0; e < kPerVector; ++e) value[i + e] = vector.item[e];
    } else {
#pragma unroll
      for (int e = 0; e < kPerVector; ++e) value[i + e] = live >> (i + e) & 1 ? first[e] : W{};
    }
  }
}

// How many bits are set in the words of the lanes before this one.
__device__ __forceinline__ int bits_before_lane(uint32_t word, int lane) {
  int total;
  return warp_sum_before(__popc(word), lane, &total);
}

// Which of the tile's set bits the first of the lane's columns i, i + 1, .. is; `rest` becomes
// their bits, that of column i the lowest. `before` is bits_before_lane(word).
template <int kPerVector>
__device__ __forceinline__ int rank_of_column(uint32_t word, int before, int lane, int i,
                                              uint32_t* rest) {
  const int column = lane_column(kPerVector, lane, i);
  const uint32_t of_column = __shfl_sync(kAllLanes, word, column / kWordBits);
  const int first = __shfl_sync(kAllLanes, before, column / kWordBits);
  *rest = of_column >> (column % kWordBits);
  return first + __popc(bits_before(of_column, column % kWordBits));
}

// Lanes read at the ranks of their columns: neighbours read neighbouring values.
template <typename W>
__device__ __forceinline__ void load_packed(const TiledWeights& w, int64_t flat_row, int64_t tile,
                                            int lane, uint32_t layout, uint32_t live,
                                            W (&value)[kLaneColumns]) {
  constexpr int kPerVector = kVector<W>;
  const W* stored = static_cast<const W*>(w.all.values) + w.tile_start[flat_row * w.tiles + tile];
  const int before = bits_before_lane(layout, lane);
#pragma unroll
  for (int i = 0; i < kLaneColumns; i += kPerVector) {
    uint32_t rest;
    const int rank = rank_of_column<kPerVector>(layout, before, lane, i, &rest);
#pragma unroll
    for (int e = 0; e < kPerVector; ++e) {
      const bool is_live = live >> (i + e) & 1;
      value[i + e] = is_live ? stored[rank + __popc(bits_before(rest, e))] : W{};
    }
  }
}

// Loads the lane's live weights of a tile and returns which of its columns they are; the others'
// values mean nothing. `word` is the lane's mask word. All lanes of the warp must call it.
template <typename W, bool kPacked>
__device__ __forceinline__ uint32_t load_tile(const TiledWeights& w, int64_t flat_row, int64_t tile,
                                              int lane, uint32_t word, W (&value)[kLaneColumns]) {
  uint32_t layout = 0;
  if constexpr (kPacked) {
    layout = word_of_lane(w.all.layout, w.all, flat_row, tile, lane);
    word &= layout;
  }
  const uint32_t live = bits_of_lane<kVector<W>>(word, lane);
  if constexpr (kPacked) {
    load_packed(w, flat_row, tile, lane, layout, live, value);
  } else {
    load_dense(w, flat_row, tile, lane, live, value);
  }
  return live;
}

// map_weight of a map that is chosen at run time, without the branches that would cost more than
// the arithmetic: the product of two copies of w, each of which is w, |w| or 1.
template <typename A>
class AnyMap {
 public:
  PP_HD explicit AnyMap(WeightMap map) {
    constexpr Bits kAll = ~Bits{0}, kMagnitude = kAll >> 1;
    const Bits one = bit_cast<Bits>(A(1));
    const bool is_one = map == WeightMap::kOne, is_square = map == WeightMap::kSquare;
    keep_ = is_one ? 0 : map == WeightMap::kAbs ? kMagnitude : kAll;
    set_ = is_one ? one : 0;
    keep_factor_ = is_square ? kAll : 0;
    set_factor_ = is_square ? 0 : one;
  }

  PP_HD A operator()(A w) const {
    const Bits bits = bit_cast<Bits>(w);
    return times(bit_cast<A>((bits & keep_) | set_),
                 bit_cast<A>((bits & keep_factor_) | set_factor_));
  }

 private:
  using Bits = FloatKey<A>;
  Bits keep_, set_, keep_factor_, set_factor_;
};

// A flow at the lane's columns of a tile; 0 where there is no column.
template <int kPerVector, typename A>
__device__ __forceinline__ void load_flow(const A* flow,  // [columns]
                                          int64_t columns, int64_t tile, int lane, bool vectors,
                                          A (&value)[kLaneColumns]) {
  constexpr int kStep = kVector<A>;
  static_assert(kPerVector % kStep == 0);
#pragma unroll
  for (int i = 0; i < kLaneColumns; i += kStep) {
    const int64_t column = tile * kTileColumns + lane_column(kPerVector, lane, i);
    if (vectors) {
      Vector<A> vector{};
      if (column < columns) vector = *reinterpret_cast<const Vector<A>*>(flow + column);
#pragma unroll
      for (int e = 0; e < kStep; ++e) value[i + e] = vector.item[e];
    } else {
#pragma unroll
      for (int e = 0; e < kStep; ++e) value[i + e] = column + e < columns ? flow[column + e] : A(0);
    }
  }
}

// The flows that scores are made of, as an argument of kernels.
template <typename A>
struct Scoring {
  WeightMap s;
  bool has_flows;
  const A* x;  // [groups, positions, columns]
  const A* g;  // [groups, positions, rows]
  int64_t positions;
  bool vectors;  // x is made of whole vectors
};

template <typename A>
Scoring<A> scoring(const Score& score, int64_t columns) {
  return {score.s,
          score.has_flows,
          static_cast<const A*>(score.x),
          static_cast<const A*>(score.g),
          score.positions,
          has_vectors<A>(score.x, columns)};
}

// Whether scores have flows of exactly one position, the common case, which kernels are also
// compiled for alone: it takes fewer registers and keeps the flow into the columns of a tile.
inline bool has_one_position(const Score& score) { return score.has_flows && score.positions == 1; }

template <int kPerVector, typename A>
__device__ __forceinline__ void load_only_flow(const Scoring<A>& score, const Weights& w,
                                               int64_t group, int64_t tile, int lane,
                                               A (&x)[kLaneColumns]) {
  load_flow<kPerVector>(score.x + group * w.columns, w.columns, tile, lane, score.vectors, x);
}

// The scores of a tile, of one position; those of weights that are not live mean nothing.
template <typename W, typename A>
__device__ __forceinline__ void score_with(const Scoring<A>& score, const Weights& w, int64_t group,
                                           int64_t row, const A (&x)[kLaneColumns],
                                           const W (&value)[kLaneColumns], A (&v)[kLaneColumns]) {
  const AnyMap<A> s(score.s);
  const A g = score.g[group * w.rows + row];
#pragma unroll
  for (int i = 0; i < kLaneColumns; ++i) {
    v[i] = through_flow(s(widen(value[i])), x[i], g);
  }
}

// The same of any number of positions, or without flows. Products and sums as in through_flow.h.
template <typename W, typename A>
__device__ __forceinline__ void score_tile(const Scoring<A>& score, const Weights& w, int64_t group,
                                           int64_t row, int64_t tile, int lane,
                                           const W (&value)[kLaneColumns], A (&v)[kLaneColumns]) {
  const AnyMap<A> s(score.s);
  if (!score.has_flows) {
#pragma unroll
    for (int i = 0; i < kLaneColumns; ++i) v[i] = s(widen(value[i]));
    return;
  }
  A x[kLaneColumns];
  if (score.positions == 1) {
    load_only_flow<kVector<W>>(score, w, group, tile, lane, x);
    score_with(score, w, group, row, x, value, v);
    return;
  }
#pragma unroll
  for (int i = 0; i < kLaneColumns; ++i) v[i] = A(0);
#pragma unroll 1
  for (int64_t t = group * score.positions; t < (group + 1) * score.positions; ++t) {
    load_flow<kVector<W>>(score.x + t * w.columns, w.columns, tile, lane, score.vectors, x);
    const A g = score.g[t * w.rows + row];
#pragma unroll
    for (int i = 0; i < kLaneColumns; ++i) v[i] = plus(v[i], times(x[i], g));
  }
#pragma unroll
  for (int i = 0; i < kLaneColumns; ++i) v[i] = times(s(widen(value[i])), v[i]);
}

}  // namespace pathprune::cuda
