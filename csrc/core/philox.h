// Philox4x32-10: random words as a pure function of (key, counter), so that the same numbers come
// out for any number of threads and on any device.
// Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.

#pragma once

#include <cstdint>

#include "core/macros.h"

namespace pathprune {

struct PhiloxBlock {
  uint32_t word[4];

  // Words 0 and 1, or 2 and 3, as one: the first of the two is the low half.
  PP_HD uint64_t word64(int half) const {
    return static_cast<uint64_t>(word[2 * half + 1]) << 32 | word[2 * half];
  }
};

inline constexpr int kPhiloxRounds = 10;
inline constexpr uint32_t kPhiloxMultiplier[2] = {0xD2511F53u, 0xCD9E8D57u};
inline constexpr uint32_t kPhiloxWeyl[2] = {0x9E3779B9u, 0xBB67AE85u};  // added to the key a round

namespace philox_detail {

PP_HD uint32_t multiply_high(uint32_t a, uint32_t b) {
  return static_cast<uint32_t>((static_cast<uint64_t>(a) * b) >> 32);
}

PP_HD PhiloxBlock round(const PhiloxBlock& c, uint32_t key0, uint32_t key1) {
  constexpr uint32_t kMultiplier0 = kPhiloxMultiplier[0], kMultiplier1 = kPhiloxMultiplier[1];
  return {{multiply_high(kMultiplier1, c.word[2]) ^ c.word[1] ^ key0, kMultiplier1 * c.word[2],
           multiply_high(kMultiplier0, c.word[0]) ^ c.word[3] ^ key1, kMultiplier0 * c.word[0]}};
}

}  // namespace philox_detail

// The block of four words at a 128-bit counter, given as its two 64-bit halves.
PP_HD PhiloxBlock philox(uint64_t seed, uint64_t counter_low, uint64_t counter_high = 0) {
  constexpr uint32_t kWeyl0 = kPhiloxWeyl[0], kWeyl1 = kPhiloxWeyl[1];
  uint32_t key0 = static_cast<uint32_t>(seed);
  uint32_t key1 = static_cast<uint32_t>(seed >> 32);
  PhiloxBlock block = {
      {static_cast<uint32_t>(counter_low), static_cast<uint32_t>(counter_low >> 32),
       static_cast<uint32_t>(counter_high), static_cast<uint32_t>(counter_high >> 32)}};
  PP_UNROLL
  for (int i = 0; i < kPhiloxRounds; ++i) {
    block = philox_detail::round(block, key0, key1);
    key0 += kWeyl0;
    key1 += kWeyl1;
  }
  return block;
}

// The middle of one of 2^53 equal parts of (0, 1), chosen by 53 bits of the words 0 and 1. Never 0;
// the middle of the last part is no double and would round to 1, so 1 - 2^-53 stands for it.
PP_HD double uniform53(const PhiloxBlock& block) {
  constexpr double kPart = 1.0 / 9007199254740992.0;  // 2^-53
  const double part = (block.word[0] >> 5) * 67108864.0 + (block.word[1] >> 6);
  const double middle = (part + 0.5) * kPart;
  return middle < 1.0 - kPart ? middle : 1.0 - kPart;
}

}  // namespace pathprune
