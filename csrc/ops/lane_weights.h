// 16-bit weights made float32, and weight maps on lanes.

#pragma once

#include <cstring>
#include <limits>

#include "core/lanes.h"
#include "core/weight_map.h"
#include "ops/weights.h"

namespace pathprune::PATHPRUNE_ISA {

// Sixteen weights as they are stored, in the type of the flows.
template <typename A>
PP_INLINE Lanes<A> load_wide(const A* w) {
  return load(w);
}

PP_INLINE Lanes<float> load_wide(const Bfloat16* w) {
  Lanes<float> wide;
#if PP_AVX512
  const __m512i bits = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)w));
  wide.part[0] = (Vector<float>)_mm512_slli_epi32(bits, 16);
#else
  float lane[kLanes];
  for (int i = 0; i < kLanes; ++i) lane[i] = widen(w[i]);
  wide = load(lane);
#endif
  return wide;
}

PP_INLINE Lanes<float> load_wide(const Float16* w) {
  Lanes<float> wide;
#if PP_AVX512
  wide.part[0] = (Vector<float>)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)w));
#elif defined(__F16C__)
  for (int i = 0; i < Lanes<float>::kParts; ++i) {
    wide.part[i] = (Vector<float>)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(w + 8 * i)));
  }
#else
  float lane[kLanes];
  for (int i = 0; i < kLanes; ++i) lane[i] = widen(w[i]);
  wide = load(lane);
#endif
  return wide;
}

// The first `count` < 16 of them; nothing behind them is read, and the others are 0.
template <typename W>
PP_INLINE Lanes<Accumulate<W>> load_first_wide(const W* w, int64_t count) {
  W stored[kLanes] = {};
  std::memcpy(stored, w, count * sizeof(W));
  return load_wide(stored);
}

template <typename W>
PP_INLINE void widen_values(const W* w, int64_t count, float* wide) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    store(wide + i, load_wide(w + i));
  }
  for (; i < count; ++i) wide[i] = widen(w[i]);
}

// `count` values of a 16-bit type, from `begin` on.
inline void widen_values(const Weights& w, int64_t begin, int64_t count, float* wide) {
  if (w.storage == Storage::kBfloat16) {
    widen_values(static_cast<const Bfloat16*>(w.values) + begin, count, wide);
  } else {
    widen_values(static_cast<const Float16*>(w.values) + begin, count, wide);
  }
}

// A weight map chosen at run time, without a branch: the product of two filtered copies of w, each
// of which is w, |w| or 1.
template <typename A>
class AnyMap {
 public:
  PP_INLINE explicit AnyMap(WeightMap map) {
    constexpr Integer<A> kAll = -1;
    constexpr Integer<A> kMagnitude = std::numeric_limits<Integer<A>>::max();
    const auto one = bit_cast<Integer<A>>(A(1));
    const bool is_one = map == WeightMap::kOne, is_square = map == WeightMap::kSquare;
    mask_ = broadcast<Integer<A>>(is_one ? 0 : map == WeightMap::kAbs ? kMagnitude : kAll);
    set_ = broadcast<Integer<A>>(is_one ? one : 0);
    factor_mask_ = broadcast<Integer<A>>(is_square ? kAll : 0);
    factor_set_ = broadcast<Integer<A>>(is_square ? 0 : one);
  }

  PP_INLINE Lanes<A> operator()(const Lanes<A>& w) const {
    return filter(w, mask_, set_) * filter(w, factor_mask_, factor_set_);
  }

 private:
  Lanes<Integer<A>> mask_, set_, factor_mask_, factor_set_;
};

// A weight map known when compiling, for the sweeps that are bound by arithmetic.
template <typename A, WeightMap kMap>
class OneMap {
 public:
  PP_INLINE explicit OneMap(WeightMap) {}

  PP_INLINE Lanes<A> operator()(const Lanes<A>& w) const {
    if constexpr (kMap == WeightMap::kSquare) return w * w;
    constexpr Integer<A> kMagnitude = std::numeric_limits<Integer<A>>::max();
    return filter(w, broadcast<Integer<A>>(kMagnitude), Lanes<Integer<A>>{});
  }
};

// The mapped weights of one word of kRows rows.
template <typename A, int kRows>
struct Mapped {
  Lanes<A> row[kRows];
};

template <typename Map, typename A, int kRows>
PP_INLINE Mapped<A, kRows> map_rows(const Map& map, const Lanes<A> (&w)[kRows]) {
  Mapped<A, kRows> mapped;
#pragma GCC unroll 4
  for (int j = 0; j < kRows; ++j) mapped.row[j] = map(w[j]);
  return mapped;
}

// These times one number for each row.
template <typename A, int kRows>
PP_INLINE Mapped<A, kRows> weigh_rows(const Mapped<A, kRows>& mapped, const Lanes<A> (&g)[kRows]) {
  Mapped<A, kRows> weighed;
#pragma GCC unroll 4
  for (int j = 0; j < kRows; ++j) weighed.row[j] = mapped.row[j] * g[j];
  return weighed;
}

}  // namespace pathprune::PATHPRUNE_ISA
