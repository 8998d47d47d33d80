// Fingerprints of memory on the CPU.

#pragma once

#include <cstdint>

#include "core/isa.h"

namespace pathprune {

// That of whole words, at any address, of which the first has this place.
PP_IN_EVERY_ISA(uint64_t fingerprint_of_words(const uint8_t* bytes, int64_t words, int64_t first);)

}  // namespace pathprune
