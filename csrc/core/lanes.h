// Sixteen values at a time: the weights of one mask word. This file is compiled once for each
// instruction set, in a namespace of its own, and means the same to the bit in all of them: an
// operation rounds every lane by itself, and `sum` adds the lanes in one fixed order.
//
// Lanes are held in the compiler's own vector types, as wide as the instruction set has them: those
// have the arithmetic operators. What they lack (bit masks, expand, compress) is written with
// intrinsics for AVX-512, where it is the heart of the matter, and plainly for the rest.

#pragma once

#include <cstdint>
#include <cstring>

#if defined(__SSE2__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC 12 about its own _mm512_undefined
#pragma GCC diagnostic ignored "-Wuninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#endif

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
#define PP_AVX512 1
#else
#define PP_AVX512 0
#endif

#define PP_INLINE inline __attribute__((always_inline))

namespace pathprune::PATHPRUNE_ISA {

inline constexpr int kLanes = 16;

using Bits = uint32_t;  // bit b is about lane b; the upper 16 are zero
inline constexpr Bits kAllLanes = 0xFFFF;

PP_INLINE Bits first_lanes(int64_t count) {
  return count >= kLanes ? kAllLanes : (Bits{1} << count) - 1;
}

#if PP_AVX512
inline constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
inline constexpr int kVectorBytes = 32;
#else
inline constexpr int kVectorBytes = 16;
#endif

template <typename T>
struct VectorOf {
  typedef T type __attribute__((vector_size(kVectorBytes)));
};
template <typename T>
using Vector = typename VectorOf<T>::type;

template <typename T>
struct IntegerOf {
  using type = int32_t;
};
template <>
struct IntegerOf<double> {
  using type = int64_t;
};
template <typename T>
using Integer = typename IntegerOf<T>::type;  // as wide as T

template <typename T>
struct Lanes {
  static constexpr int kWidth = kVectorBytes / static_cast<int>(sizeof(T));
  static constexpr int kParts = kLanes / kWidth;
  Vector<T> part[kParts];
};

#if PP_AVX512
// The compiler's own adds signed numbers, which must not go beyond 2^63.
PP_INLINE uint64_t sum_of_lanes(__m512i sums) {
  uint64_t lane[8], total = 0;
  _mm512_storeu_si512(lane, sums);
  for (const uint64_t one : lane) total += one;
  return total;
}
#endif

// ---- what the compiler's vectors can do -------------------------------------------------------

template <typename T>
PP_INLINE Lanes<T> broadcast(T value) {
  Lanes<T> v;
  for (auto& part : v.part) part = value - Vector<T>{};
  return v;
}

template <typename T>
PP_INLINE Lanes<T> load(const T* from) {
  Lanes<T> v;
  for (int i = 0; i < Lanes<T>::kParts; ++i) {
    std::memcpy(&v.part[i], from + i * Lanes<T>::kWidth, kVectorBytes);
  }
  return v;
}

// The first `count` < 16 lanes; nothing behind them is read, and the others are 0.
template <typename T>
PP_INLINE Lanes<T> load_first(const T* from, int64_t count) {
  T lane[kLanes] = {};
  std::memcpy(lane, from, count * sizeof(T));
  return load(lane);
}

template <typename T>
PP_INLINE void store(T* to, const Lanes<T>& v) {
  for (int i = 0; i < Lanes<T>::kParts; ++i) {
    std::memcpy(to + i * Lanes<T>::kWidth, &v.part[i], kVectorBytes);
  }
}

template <typename T>
PP_INLINE Lanes<T> operator+(const Lanes<T>& a, const Lanes<T>& b) {
  Lanes<T> v;
  for (int i = 0; i < Lanes<T>::kParts; ++i) v.part[i] = a.part[i] + b.part[i];
  return v;
}

template <typename T>
PP_INLINE Lanes<T> operator*(const Lanes<T>& a, const Lanes<T>& b) {
  Lanes<T> v;
  for (int i = 0; i < Lanes<T>::kParts; ++i) v.part[i] = a.part[i] * b.part[i];
  return v;
}

template <typename T>
PP_INLINE Lanes<T> smaller(const Lanes<T>& a, const Lanes<T>& b) {
  Lanes<T> v;
  for (int i = 0; i < Lanes<T>::kParts; ++i)
    v.part[i] = a.part[i] < b.part[i] ? a.part[i] : b.part[i];
  return v;
}

template <typename T>
PP_INLINE Lanes<T> larger(const Lanes<T>& a, const Lanes<T>& b) {
  Lanes<T> v;
  for (int i = 0; i < Lanes<T>::kParts; ++i)
    v.part[i] = a.part[i] > b.part[i] ? a.part[i] : b.part[i];
  return v;
}

// Under the names that the maths of single numbers has (weight_map.h).
template <typename T>
PP_INLINE Lanes<T> plus(const Lanes<T>& a, const Lanes<T>& b) {
  return a + b;
}

template <typename T>
PP_INLINE Lanes<T> times(const Lanes<T>& a, const Lanes<T>& b) {
  return a * b;
}

// (bits of v & mask) | set, lane by lane.
template <typename T>
PP_INLINE Lanes<T> filter(const Lanes<T>& v, const Lanes<Integer<T>>& mask,
                          const Lanes<Integer<T>>& set) {
  Lanes<T> out;
  for (int i = 0; i < Lanes<T>::kParts; ++i) {
    out.part[i] = (Vector<T>)(((Vector<Integer<T>>)v.part[i] & mask.part[i]) | set.part[i]);
  }
  return out;
}

// ---- what they cannot, for one vector ----------------------------------------------------------

namespace one {

#if PP_AVX512

template <typename T>
PP_INLINE Bits at_least(Bits where, Vector<T> a, Vector<T> b) {
  if constexpr (sizeof(T) == 4) return _mm512_mask_cmp_ps_mask(where, a, b, _CMP_GE_OQ);
  if constexpr (sizeof(T) == 8) return _mm512_mask_cmp_pd_mask(where, a, b, _CMP_GE_OQ);
}

template <typename T>
PP_INLINE Bits more_than(Bits where, Vector<T> a, Vector<T> b) {
  if constexpr (sizeof(T) == 4) return _mm512_mask_cmp_ps_mask(where, a, b, _CMP_GT_OQ);
  if constexpr (sizeof(T) == 8) return _mm512_mask_cmp_pd_mask(where, a, b, _CMP_GT_OQ);
}

template <typename T>
PP_INLINE Bits not_finite(Bits where, Vector<T> v) {
  constexpr int kNanOrInfinity = 0x99;
  if constexpr (sizeof(T) == 4) return _mm512_mask_fpclass_ps_mask(where, v, kNanOrInfinity);
  if constexpr (sizeof(T) == 8) return _mm512_mask_fpclass_pd_mask(where, v, kNanOrInfinity);
}

template <typename T>
PP_INLINE Vector<T> keep(Bits bits, Vector<T> v) {
  if constexpr (sizeof(T) == 4) return _mm512_maskz_mov_ps(bits, v);
  if constexpr (sizeof(T) == 8) return _mm512_maskz_mov_pd(bits, v);
}

template <typename T>
PP_INLINE Vector<T> add_where(Bits bits, Vector<T> a, Vector<T> b) {
  if constexpr (sizeof(T) == 4) return _mm512_mask_add_ps(a, bits, a, b);
  if constexpr (sizeof(T) == 8) return _mm512_mask_add_pd(a, bits, a, b);
}

template <typename T>
PP_INLINE Vector<T> expand(Bits bits, Vector<T> v) {
  if constexpr (sizeof(T) == 4) return _mm512_maskz_expand_ps(bits, v);
  if constexpr (sizeof(T) == 8) return _mm512_maskz_expand_pd(bits, v);
}

template <typename T>
PP_INLINE Vector<T> compress(Bits bits, Vector<T> v) {
  if constexpr (sizeof(T) == 4) return _mm512_maskz_compress_ps(bits, v);
  if constexpr (sizeof(T) == 8) return _mm512_maskz_compress_pd(bits, v);
}

#else

// The sign of every element.
template <typename T>
PP_INLINE Bits signs(Vector<Integer<T>> v) {
#if defined(__AVX2__)
  if constexpr (sizeof(T) == 4) return _mm256_movemask_ps((__m256)v);
  if constexpr (sizeof(T) == 8) return _mm256_movemask_pd((__m256d)v);
#elif defined(__SSE2__)
  if constexpr (sizeof(T) == 4) return _mm_movemask_ps((__m128)v);
  if constexpr (sizeof(T) == 8) return _mm_movemask_pd((__m128d)v);
#else
  Bits bits = 0;
  for (int i = 0; i < Lanes<T>::kWidth; ++i) bits |= Bits{v[i] < 0} << i;
  return bits;
#endif
}

template <typename T>
PP_INLINE Bits at_least(Bits where, Vector<T> a, Vector<T> b) {
  return where & signs<T>(a >= b);
}

template <typename T>
PP_INLINE Bits more_than(Bits where, Vector<T> a, Vector<T> b) {
  return where & signs<T>(a > b);
}

template <typename T>
PP_INLINE Bits not_finite(Bits where, Vector<T> v) {
  return where & signs<T>(v - v != Vector<T>{});
}

template <typename T>
PP_INLINE Vector<T> keep(Bits bits, Vector<T> v) {
  constexpr Integer<T> kBit[] = {1, 2, 4, 8, 16, 32, 64, 128};
  Vector<Integer<T>> bit;
  std::memcpy(&bit, kBit, sizeof(bit));
  const Vector<Integer<T>> all = static_cast<Integer<T>>(bits) + Vector<Integer<T>>{};
  return (Vector<T>)((Vector<Integer<T>>)v & ((all & bit) == bit));
}

template <typename T>
PP_INLINE Vector<T> add_where(Bits bits, Vector<T> a, Vector<T> b) {
  return a + keep<T>(bits, b);
}

#endif

}  // namespace one

// ---- what they cannot, for sixteen lanes -------------------------------------------------------

// The bits of part i, moved down.
template <typename T>
PP_INLINE Bits of_part(Bits bits, int i) {
  constexpr int kWidth = Lanes<T>::kWidth;
  return (bits >> (i * kWidth)) & ((Bits{1} << kWidth) - 1);
}

// Comparisons of the lanes whose bit is set in `where`; the other bits of the result are 0.
template <typename T>
PP_INLINE Bits at_least(Bits where, const Lanes<T>& a, const Lanes<T>& b) {
  Bits bits = 0;
  for (int i = 0; i < Lanes<T>::kParts; ++i) {
    bits |= one::at_least<T>(of_part<T>(where, i), a.part[i], b.part[i]) << (i * Lanes<T>::kWidth);
  }
  return bits;
}

template <typename T>
PP_INLINE Bits more_than(Bits where, const Lanes<T>& a, const Lanes<T>& b) {
  Bits bits = 0;
  for (int i = 0; i < Lanes<T>::kParts; ++i) {
    bits |= one::more_than<T>(of_part<T>(where, i), a.part[i], b.part[i]) << (i * Lanes<T>::kWidth);
  }
  return bits;
}

template <typename T>
PP_INLINE Bits not_finite(Bits where, const Lanes<T>& v) {
  Bits bits = 0;
  for (int i = 0; i < Lanes<T>::kParts; ++i) {
    bits |= one::not_finite<T>(of_part<T>(where, i), v.part[i]) << (i * Lanes<T>::kWidth);
  }
  return bits;
}

// v where the bit is set, else 0.
template <typename T>
PP_INLINE Lanes<T> keep(Bits bits, const Lanes<T>& v) {
  Lanes<T> out;
  for (int i = 0; i < Lanes<T>::kParts; ++i) {
    out.part[i] = one::keep<T>(of_part<T>(bits, i), v.part[i]);
  }
  return out;
}

// a + b where the bit is set, else a (but +0 for a = -0).
template <typename T>
PP_INLINE Lanes<T> add_where(Bits bits, const Lanes<T>& a, const Lanes<T>& b) {
  Lanes<T> out;
  for (int i = 0; i < Lanes<T>::kParts; ++i) {
    out.part[i] = one::add_where<T>(of_part<T>(bits, i), a.part[i], b.part[i]);
  }
  return out;
}

// The lanes whose bit is set are the first popcount(bits) of v, in order; the others are 0.
template <typename T>
PP_INLINE Lanes<T> expand(Bits bits, const T* v) {
  Lanes<T> out;
#if PP_AVX512
  for (auto& part : out.part) {
    Vector<T> next;
    std::memcpy(&next, v, sizeof(next));
    asm("" : "+v"(next));  // expanding straight from memory is several times slower
    const Bits here = of_part<T>(bits, static_cast<int>(&part - out.part));
    part = one::expand<T>(here, next);
    v += __builtin_popcount(here);
  }
#else
  T lane[kLanes] = {};
  for (; bits; bits &= bits - 1) lane[__builtin_ctz(bits)] = *v++;
  out = load(lane);
#endif
  return out;
}

// Its inverse: writes the lanes whose bit is set, and returns their end. Whole vectors are stored,
// so up to sixteen values behind the end are overwritten.
template <typename T>
PP_INLINE T* append(T* to, Bits bits, const Lanes<T>& v) {
#if PP_AVX512
  // A compressing store would be several times slower than compressing in the register.
  for (auto& part : v.part) {
    const Bits here = of_part<T>(bits, static_cast<int>(&part - v.part));
    const Vector<T> packed = one::compress<T>(here, part);
    std::memcpy(to, &packed, sizeof(packed));
    to += __builtin_popcount(here);
  }
#else
  if (bits == 0) return to;
  if (bits == kAllLanes) {
    store(to, v);
    return to + kLanes;
  }
  T lane[kLanes];
  store(lane, v);
  for (; bits; bits &= bits - 1) *to++ = lane[__builtin_ctz(bits)];
#endif
  return to;
}

// How many bits were set in all masks that were added.
class BitCount {
 public:
#if PP_AVX512
  PP_INLINE void add(Bits bits) {
    lanes_ = _mm512_mask_sub_epi32(lanes_, bits, lanes_, _mm512_set1_epi32(-1));
  }
  PP_INLINE int64_t total() const { return _mm512_reduce_add_epi32(lanes_); }

 private:
  __m512i lanes_ = _mm512_setzero_si512();
#else
  PP_INLINE void add(Bits bits) { total_ += __builtin_popcount(bits); }
  PP_INLINE int64_t total() const { return total_; }

 private:
  int64_t total_ = 0;
#endif
};

// Which of the first `count` <= 64 words are not zero.
PP_INLINE uint64_t nonzero_words(const uint16_t* words, int count) {
#if PP_AVX512
  const uint64_t read = count == 64 ? ~uint64_t{0} : (uint64_t{1} << count) - 1;
  const __m512i low = _mm512_maskz_loadu_epi16(static_cast<__mmask32>(read), words);
  const __m512i high = _mm512_maskz_loadu_epi16(static_cast<__mmask32>(read >> 32), words + 32);
  return uint64_t{_mm512_test_epi16_mask(low, low)} | uint64_t{_mm512_test_epi16_mask(high, high)}
                                                          << 32;
#else
  uint64_t nonzero = 0;
  int i = 0;
#if defined(__SSE2__)
  for (; i + 16 <= count; i += 16) {
    const __m128i* eight = reinterpret_cast<const __m128i*>(words + i);
    const __m128i low = _mm_cmpeq_epi16(_mm_loadu_si128(eight), _mm_setzero_si128());
    const __m128i high = _mm_cmpeq_epi16(_mm_loadu_si128(eight + 1), _mm_setzero_si128());
    const auto zero = static_cast<uint16_t>(_mm_movemask_epi8(_mm_packs_epi16(low, high)));
    nonzero |= uint64_t{static_cast<uint16_t>(~zero)} << i;
  }
#endif
  for (; i < count; ++i) nonzero |= uint64_t{words[i] != 0} << i;
  return nonzero;
#endif
}

template <int kHalf, typename T>
PP_INLINE void fold(T* lane) {
  for (int i = 0; i < kHalf; ++i) lane[i] += lane[i + kHalf];
  if constexpr (kHalf > 1) fold<kHalf / 2>(lane);
}

// The upper half is added to the lower, until one is left: the same tree for every vector width.
template <typename T>
PP_INLINE T sum(const Lanes<T>& v) {
  Lanes<T> folded = v;
  for (int half = Lanes<T>::kParts / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) folded.part[i] += folded.part[i + half];
  }
  T lane[Lanes<T>::kWidth];
  std::memcpy(lane, &folded.part[0], sizeof(lane));
  fold<Lanes<T>::kWidth / 2>(lane);
  return lane[0];
}

}  // namespace pathprune::PATHPRUNE_ISA
