// Square blocks of vectors, transposed or summed crosswise in registers.
//
// `trade` exchanges half of the lanes of two vectors: those that have a given bit in their number.
// Doing so once for every bit transposes a block; adding what is exchanged sums it.

#pragma once

#include <algorithm>
#include <utility>

#include "core/lanes.h"

namespace pathprune::PATHPRUNE_ISA {

template <typename T>
inline constexpr int kWidth = Lanes<T>::kWidth;

// a * b + c, rounded once where the instruction set can: sums differ in their last bits between
// instruction sets, unlike what core/lanes.h has.
template <typename T>
PP_INLINE Vector<T> fused(Vector<T> a, Vector<T> b, Vector<T> c) {
#if PP_AVX512
  if constexpr (sizeof(T) == 4) return _mm512_fmadd_ps(a, b, c);
  if constexpr (sizeof(T) == 8) return _mm512_fmadd_pd(a, b, c);
#elif defined(__FMA__)
  if constexpr (sizeof(T) == 4) return _mm256_fmadd_ps(a, b, c);
  if constexpr (sizeof(T) == 8) return _mm256_fmadd_pd(a, b, c);
#else
  return a * b + c;
#endif
}

template <typename T>
PP_INLINE Vector<T> load_vector(const T* from) {
  Vector<T> v;
  std::memcpy(&v, from, sizeof(v));
  return v;
}

// The first `count` <= kWidth elements, and zeros.
template <typename T>
PP_INLINE Vector<T> load_vector(const T* from, int64_t count) {
  if (count >= kWidth<T>) return load_vector(from);
  Vector<T> v = {};
  std::memcpy(&v, from, count * sizeof(T));
  return v;
}

template <typename T>
PP_INLINE void store_vector(T* to, Vector<T> v, int64_t count = kWidth<T>) {
  std::memcpy(to, &v, (count >= kWidth<T> ? kWidth<T> : count) * sizeof(T));
}

// Lane i of the lower is a[i], of the upper a[i + kApart], where i lacks the bit kApart; else
// b[i - kApart] and b[i].
template <typename T, int kApart, bool kUpper, int... kLane>
PP_INLINE Vector<T> trade(Vector<T> a, Vector<T> b, std::integer_sequence<int, kLane...>) {
  constexpr int kB = sizeof...(kLane);
  return __builtin_shufflevector(
      a, b,
      (kLane & kApart ? kB + kLane - (kUpper ? 0 : kApart) : kLane + (kUpper ? kApart : 0))...);
}

template <typename T, int kApart, bool kUpper>
PP_INLINE Vector<T> trade(Vector<T> a, Vector<T> b) {
  return trade<T, kApart, kUpper>(a, b, std::make_integer_sequence<int, kWidth<T>>());
}

template <typename T, int kApart = kWidth<T> / 2>
PP_INLINE void transpose(Vector<T> (&v)[kWidth<T>]) {
#pragma GCC unroll 16
  for (int i = 0; i < kWidth<T>; ++i) {
    if (i & kApart) continue;
    const Vector<T> lower = trade<T, kApart, false>(v[i], v[i + kApart]);
    v[i + kApart] = trade<T, kApart, true>(v[i], v[i + kApart]);
    v[i] = lower;
  }
  if constexpr (kApart > 1) transpose<T, kApart / 2>(v);
}

// Lane i is the sum over all lanes of vector(i). Few vectors are alive at a time: the halves are
// summed one after the other.
template <typename T, int kCount = kWidth<T>, int kFirst = 0, typename VectorAt>
PP_INLINE Vector<T> sum_crosswise(const VectorAt& vector) {
  if constexpr (kCount == 1) {
    return vector(kFirst);
  } else {
    constexpr int kHalf = kCount / 2;
    const Vector<T> a = sum_crosswise<T, kHalf, kFirst>(vector);
    const Vector<T> b = sum_crosswise<T, kHalf, kFirst + kHalf>(vector);
    return trade<T, kHalf, false>(a, b) + trade<T, kHalf, true>(a, b);
  }
}

}  // namespace pathprune::PATHPRUNE_ISA
