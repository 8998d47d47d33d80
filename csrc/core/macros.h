// What every core header needs: host+device functions and bit casts.

#pragma once

#include <cstdint>

// Marks a function for host and device. Always inline: csrc/core/isa.h says why a copy of it out of
// line, compiled for one instruction set, must not be there for another to be linked with.
#if defined(__CUDACC__)
#define PP_HD __host__ __device__ __forceinline__
#else
#define PP_HD inline __attribute__((always_inline))
#endif

namespace pathprune {

// std::bit_cast, for device code too.
template <typename To, typename From>
PP_HD To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  __builtin_memcpy(&to, &from, sizeof(to));
  return to;
}

}  // namespace pathprune
