// What every core header needs: host+device functions, bit casts, division upwards.

#pragma once

#include <cstdint>

// Marks a function for host and device. Always inline: csrc/core/isa.h says why a copy of it out of
// line, compiled for one instruction set, must not be there for another to be linked with.
#if defined(__CUDACC__)
#define PP_HD __host__ __device__ __forceinline__
#else
#define PP_HD inline __attribute__((always_inline))
#endif

// Before a short loop that is to be written out, so that what is around it can go by lanes.
#if defined(__CUDACC__)
#define PP_UNROLL _Pragma("unroll")
#else
#define PP_UNROLL _Pragma("GCC unroll 16")
#endif

namespace pathprune {

PP_HD int64_t ceil_divide(int64_t a, int64_t b) { return (a + b - 1) / b; }

// std::bit_cast, for device code too.
template <typename To, typename From>
PP_HD To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  __builtin_memcpy(&to, &from, sizeof(to));
  return to;
}

}  // namespace pathprune
