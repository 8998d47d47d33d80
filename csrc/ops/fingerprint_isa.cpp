// Fingerprints of memory, compiled for each instruction set.

#include "ops/fingerprint.h"

#include <cstring>

#include "core/fingerprint.h"

namespace pathprune::PATHPRUNE_ISA {

uint64_t fingerprint_of_words(const uint8_t* bytes, int64_t words, int64_t first) {
  constexpr int64_t kBytesAhead = 4096;
  constexpr int64_t kStep = 32;  // words
  uint64_t sum = 0;
  int64_t i = 0;
  for (; i + kStep <= words; i += kStep) {
    for (int64_t line = 0; line < 8 * kStep; line += 64) {
      __builtin_prefetch(bytes + 8 * i + kBytesAhead + line, 0, 2);
    }
    for (int64_t k = i; k < i + kStep; ++k) {
      uint64_t word;
      std::memcpy(&word, bytes + 8 * k, sizeof(word));
      sum += fingerprint_of_word(word, first + k);
    }
  }
  for (; i < words; ++i) {
    uint64_t word;
    std::memcpy(&word, bytes + 8 * i, sizeof(word));
    sum += fingerprint_of_word(word, first + i);
  }
  return sum;
}

}  // namespace pathprune::PATHPRUNE_ISA
