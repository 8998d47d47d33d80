// The natural logarithm of a double, the same bits on every processor and device: libraries differ
// in the last place. Within one unit there; after fdlibm's __ieee754_log (Sun Microsystems, 1993),
// its products and sums written as fused ones, which no compiler can round in another way.

#pragma once

#include <cmath>
#include <cstdint>

#include "core/macros.h"

namespace pathprune {

// Of a number > 0 that is finite; without a branch, so that it runs in lanes.
PP_HD double natural_log(double x) {
  constexpr double kLn2High = 6.93147180369123816490e-01, kLn2Low = 1.90821492927058770002e-10;
  const bool is_small = x < 2.2250738585072014e-308;  // subnormal
  const double larger = x * 18014398509481984.0;      // by 2^54
  const double scaled = is_small ? larger : x;
  // x = 2^exponent * (1 + f), 1 + f from sqrt(1/2) to sqrt(2)
  constexpr int64_t kHalfRoot = 0x3fe6a09e667f3bcd;
  const int64_t bits = bit_cast<int64_t>(scaled);
  const int64_t above = (bits - kHalfRoot) >> 52;
  const double f = bit_cast<double>(bits - above * (int64_t{1} << 52)) - 1.0;
  const double exponent = static_cast<double>(static_cast<int32_t>(above) - (is_small ? 54 : 0));
  const double s = f / (2.0 + f), z = s * s, half = 0.5 * f * f;
  double series = 1.479819860511658591e-01;
  series = fma(series, z, 1.531383769920937332e-01);
  series = fma(series, z, 1.818357216161805012e-01);
  series = fma(series, z, 2.222219843214978396e-01);
  series = fma(series, z, 2.857142874366239149e-01);
  series = fma(series, z, 3.999999999940941908e-01);
  series = fma(series, z, 6.666666666666735130e-01);
  const double rest = fma(-s, fma(series, z, half), half);
  const double low = fma(-exponent, kLn2Low, rest) - f;
  return fma(exponent, kLn2High, -low);
}

}  // namespace pathprune
