// A fingerprint of memory that threads, blocks and devices can take in any order: the sum, modulo
// 2^64, of its 64-bit words, each mixed with its place by SplitMix64's finalizer (Steele, Lea,
// Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014). Of n zeros it is the sum
// of that generator's first n numbers at seed 0. No protection against an adversary.

#pragma once

#include <cstdint>

#include "core/macros.h"

namespace pathprune {

PP_HD uint64_t fingerprint_of_word(uint64_t word, int64_t place) {
  uint64_t x = word + static_cast<uint64_t>(place + 1) * 0x9E3779B97F4A7C15u;
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
  return x ^ (x >> 31);
}

// Up to 8 bytes as a word, little-endian, zeros behind them.
PP_HD uint64_t word_of_bytes(const uint8_t* bytes, int64_t count) {
  uint64_t word = 0;
  for (int64_t i = 0; i < count; ++i) word |= static_cast<uint64_t>(bytes[i]) << (8 * i);
  return word;
}

}  // namespace pathprune
