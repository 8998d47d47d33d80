// Masks of one bit per weight: as flat bytes (on disk) and as rows of 16-bit words (in the ops).
// A bool is a byte that is 0 or 1. In both forms the first element is the lowest bit.

#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>

#include "core/macros.h"

namespace pathprune {

inline constexpr int kWordBits = 16;

PP_HD int64_t bytes_of_bits(int64_t count) { return (count + 7) / 8; }
PP_HD int64_t words_of_columns(int64_t columns) { return (columns + kWordBits - 1) / kWordBits; }

PP_HD int popcount(uint64_t word) {
#if defined(__CUDA_ARCH__)
  return __popcll(word);
#else
  return std::popcount(word);
#endif
}

// The first `count` <= 64 bools as the low bits of a word.
PP_HD uint64_t gather_bits(const uint8_t* bools, int count) {
  uint64_t word = 0;
  for (int i = 0; i < count; ++i) word |= static_cast<uint64_t>(bools[i] != 0) << i;
  return word;
}

// Its inverse.
PP_HD void scatter_bits(uint64_t word, int count, uint8_t* bools) {
  for (int i = 0; i < count; ++i) bools[i] = (word >> i) & 1;
}

namespace bits_detail {

constexpr uint64_t kLowBits = 0x0101010101010101u;  // the lowest bit of each of eight bytes

// Eight bools as a byte: the product moves the bit of byte i to bit 56 + i.
inline uint8_t gather8(const uint8_t* bools) {
  if constexpr (std::endian::native == std::endian::little) {
    uint64_t bytes;
    __builtin_memcpy(&bytes, bools, 8);
    return static_cast<uint8_t>((bytes & kLowBits) * 0x0102040810204080u >> 56);
  }
  return static_cast<uint8_t>(gather_bits(bools, 8));
}

}  // namespace bits_detail

// `count` bools -> bytes_of_bits(count) bytes; the unused high bits of the last are zero.
inline void pack_bits(const uint8_t* bools, int64_t count, uint8_t* bytes) {
  const int64_t whole = count / 8;
  for (int64_t i = 0; i < whole; ++i) bytes[i] = bits_detail::gather8(bools + 8 * i);
  const int rest = static_cast<int>(count % 8);
  if (rest) bytes[whole] = static_cast<uint8_t>(gather_bits(bools + 8 * whole, rest));
}

inline void unpack_bits(const uint8_t* bytes, int64_t count, uint8_t* bools) {
  for (int64_t i = 0; i < count; i += 8) {
    scatter_bits(bytes[i / 8], static_cast<int>(std::min<int64_t>(8, count - i)), bools + i);
  }
}

// One row: `columns` bools -> words_of_columns(columns) words; padding bits are zero.
inline void pack_row(const uint8_t* bools, int64_t columns, int16_t* words) {
  const int64_t whole = columns / kWordBits;
  for (int64_t c = 0; c < whole; ++c) {
    const uint8_t* first = bools + kWordBits * c;
    words[c] =
        static_cast<int16_t>(bits_detail::gather8(first) | bits_detail::gather8(first + 8) << 8);
  }
  const int rest = static_cast<int>(columns % kWordBits);
  if (rest) words[whole] = static_cast<int16_t>(gather_bits(bools + kWordBits * whole, rest));
}

inline void unpack_row(const int16_t* words, int64_t columns, uint8_t* bools) {
  for (int64_t i = 0; i < columns; i += kWordBits) {
    const int count = static_cast<int>(std::min<int64_t>(kWordBits, columns - i));
    scatter_bits(static_cast<uint16_t>(words[i / kWordBits]), count, bools + i);
  }
}

// The set bits of `count` bytes, of either form.
inline int64_t count_bits(const void* bytes, int64_t count) {
  const char* next = static_cast<const char*>(bytes);
  int64_t total = 0;
  for (; count >= 8; count -= 8, next += 8) {
    uint64_t word;
    __builtin_memcpy(&word, next, 8);
    total += popcount(word);
  }
  for (; count > 0; --count, ++next) total += popcount(static_cast<uint8_t>(*next));
  return total;
}

}  // namespace pathprune
