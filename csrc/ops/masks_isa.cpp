// Masks of one bit per weight, and packing weights by them, compiled for each instruction set.

#include "ops/cpu_kernels.h"
#include "ops/lane_sweep.h"

namespace pathprune::PATHPRUNE_ISA {
namespace {

// The first `count` <= 16 bools as bits.
PP_INLINE Bits gather_bools(const uint8_t* bools, int64_t count) {
  Bits bits = 0;
  for (int64_t i = 0; i < count; ++i) bits |= Bits{bools[i] != 0} << i;
  return bits;
}

void pack(const uint8_t* bools, int64_t columns, uint16_t* words) {
  int64_t c = 0;
#if PP_AVX512
  for (; c + 64 <= columns; c += 64) {
    const __m512i bytes = _mm512_loadu_si512(bools + c);
    const uint64_t four = _mm512_test_epi8_mask(bytes, bytes);
    std::memcpy(words + c / kWordColumns, &four, sizeof(four));
  }
#elif defined(__SSE2__)
  for (; c + kWordColumns <= columns; c += kWordColumns) {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(bools + c));
    const __m128i zero = _mm_cmpeq_epi8(bytes, _mm_setzero_si128());
    words[c / kWordColumns] = static_cast<uint16_t>(~_mm_movemask_epi8(zero));
  }
#endif
  for (; c < columns; c += kWordColumns) {
    const int64_t here = std::min<int64_t>(kWordColumns, columns - c);
    words[c / kWordColumns] = static_cast<uint16_t>(gather_bools(bools + c, here));
  }
}

void unpack(const uint16_t* words, int64_t columns, uint8_t* bools) {
  int64_t c = 0;
#if PP_AVX512
  for (; c + 64 <= columns; c += 64) {
    uint64_t four;
    std::memcpy(&four, words + c / kWordColumns, sizeof(four));
    _mm512_storeu_si512(bools + c, _mm512_maskz_set1_epi8(four, 1));
  }
#endif
  for (; c < columns; ++c) bools[c] = (words[c / kWordColumns] >> (c % kWordColumns)) & 1;
}

// ---- packing weights ---------------------------------------------------------------------------

// The bits of `bits` at the places of `layout`, moved together.
PP_INLINE Bits extract_bits(Bits bits, Bits layout) {
#if defined(__BMI2__)
  return _pext_u32(bits, layout);
#else
  Bits out = 0;
  for (int i = 0; layout; layout &= layout - 1, ++i)
    out |= (bits >> __builtin_ctz(layout) & 1) << i;
  return out;
#endif
}

// Copies the values whose bit is set, and returns the end of the copy; writes nothing behind it.
template <typename T>
PP_INLINE T* copy_where(Bits bits, const T* values, T* to) {
#if PP_AVX512
  if constexpr (sizeof(T) == 4) {
    const auto count = __builtin_popcount(bits);
    const __m512i v = _mm512_maskz_loadu_epi32(static_cast<__mmask16>(bits), values);
    const __m512i packed = _mm512_maskz_compress_epi32(static_cast<__mmask16>(bits), v);
    _mm512_mask_storeu_epi32(to, static_cast<__mmask16>(first_lanes(count)), packed);
    return to + count;
  }
#endif
  if (bits == kAllLanes) {
    std::memcpy(to, values, kLanes * sizeof(T));
    return to + kLanes;
  }
  for (; bits; bits &= bits - 1) *to++ = values[__builtin_ctz(bits)];
  return to;
}

template <typename T>
void compact_row(const Weights& w, int64_t flat_row, T* to) {
  const uint16_t* mask = w.mask + flat_row * w.words;
  const uint16_t* layout = w.layout ? w.layout + flat_row * w.words : nullptr;
  const T* stored = static_cast<const T*>(w.values);
  stored += layout ? w.row_start[flat_row] : flat_row * w.columns;
  for (int64_t begin = 0; begin < w.words; begin += kTileWords) {
    const int count = static_cast<int>(std::min<int64_t>(kTileWords, w.words - begin));
    const uint16_t* words = layout ? layout : mask;
    for (uint64_t todo = nonzero_words(words + begin, count); todo; todo &= todo - 1) {
      const int64_t c = begin + __builtin_ctzll(todo);
      const Bits live = mask[c] & first_lanes(w.columns - c * kWordColumns);
      if (layout) {
        to = copy_where(extract_bits(live, layout[c]), stored, to);
        stored += __builtin_popcount(layout[c]);
      } else {
        to = copy_where(live, stored + c * kWordColumns, to);
      }
    }
  }
}

void compact(const Weights& w, int64_t flat_row, void* to) {
  if (w.storage == Storage::kFloat64) {
    compact_row(w, flat_row, static_cast<uint64_t*>(to));
  } else if (w.storage == Storage::kFloat32) {
    compact_row(w, flat_row, static_cast<uint32_t*>(to));
  } else {
    compact_row(w, flat_row, static_cast<uint16_t*>(to));
  }
}

}  // namespace

MaskKernels mask_kernels() { return {pack, unpack, sweeping::count_bits, compact}; }

}  // namespace pathprune::PATHPRUNE_ISA
