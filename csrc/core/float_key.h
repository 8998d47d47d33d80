// Order-preserving integer keys of floating-point numbers, and the neighbours of a number that is
// given as mantissa * 2^exponent.

#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#include "core/macros.h"

namespace pathprune {

template <typename T>
struct FloatTraits;

template <>
struct FloatTraits<float> {
  using Key = uint32_t;
  static constexpr int kBinBits = 17;  // sign, 8 bits of exponent, 8 of mantissa
};

template <>
struct FloatTraits<double> {
  using Key = uint64_t;
  static constexpr int kBinBits = 20;  // sign, 11 bits of exponent, 8 of mantissa
};

template <typename T>
using FloatKey = typename FloatTraits<T>::Key;

// a < b exactly when float_key(a) < float_key(b); -0 and +0 share a key. A NaN has no place in the
// order: all of them get the largest key, above +inf.
template <typename T>
PP_HD FloatKey<T> float_key(T value) {
  using Key = FloatKey<T>;
  constexpr Key kSign = Key{1} << (8 * sizeof(Key) - 1);
  if (value != value) return ~Key{0};
  const Key bits = bit_cast<Key>(value + T{0});  // -0 + 0 is +0
  return bits & kSign ? ~bits : bits | kSign;
}

// The number whose key this is.
template <typename T>
PP_HD T float_of_key(FloatKey<T> key) {
  using Key = FloatKey<T>;
  constexpr Key kSign = Key{1} << (8 * sizeof(Key) - 1);
  return bit_cast<T>(key & kSign ? key ^ kSign : ~key);
}

// The histogram bin of a number: the top bits of its key.
template <typename T>
PP_HD uint32_t float_bin(T value) {
  constexpr int kShift = 8 * sizeof(FloatKey<T>) - FloatTraits<T>::kBinBits;
  return static_cast<uint32_t>(float_key(value) >> kShift);
}

// The sign of value - mantissa * 2^exponent, exactly: -1, 0 or 1. No NaN.
inline int compare_scaled(double value, double mantissa, int64_t exponent) {
  const auto sign = [](double x) { return (x > 0) - (x < 0); };
  if (sign(value) != sign(mantissa) || value == 0 || std::isinf(value) || std::isinf(mantissa)) {
    return sign(sign(value) == sign(mantissa) ? (value == mantissa ? 0.0 : value - mantissa)
                                              : sign(value) - sign(mantissa));
  }
  int value_exponent, mantissa_exponent;
  const double value_fraction = std::frexp(std::fabs(value), &value_exponent);
  const double mantissa_fraction = std::frexp(std::fabs(mantissa), &mantissa_exponent);
  const int64_t apart = value_exponent - (mantissa_exponent + exponent);
  const int larger = apart != 0 ? (apart > 0 ? 1 : -1) : sign(value_fraction - mantissa_fraction);
  return larger * sign(value);
}

namespace float_key_detail {

// The smallest number with compare_scaled(number, ...) >= least; +inf where there is none.
template <typename T>
T smallest(double mantissa, int64_t exponent, int least) {
  if (std::isnan(mantissa)) return std::numeric_limits<T>::quiet_NaN();
  FloatKey<T> low = float_key(-std::numeric_limits<T>::infinity());
  FloatKey<T> high = float_key(std::numeric_limits<T>::infinity());
  while (low < high) {
    const FloatKey<T> middle = low + (high - low) / 2;
    if (compare_scaled(float_of_key<T>(middle), mantissa, exponent) >= least) {
      high = middle;
    } else {
      low = middle + 1;
    }
  }
  return float_of_key<T>(high) + T{0};  // the key below that of +0 would stand for -0
}

}  // namespace float_key_detail

// The smallest T that is >= mantissa * 2^exponent: +inf beyond the largest finite T, the most
// negative finite T below it (-inf for -inf itself), NaN for NaN.
template <typename T>
T float_at_least(double mantissa, int64_t exponent) {
  return float_key_detail::smallest<T>(mantissa, exponent, 0);
}

// The smallest T that is > mantissa * 2^exponent; +inf where there is none.
template <typename T>
T float_above(double mantissa, int64_t exponent) {
  return float_key_detail::smallest<T>(mantissa, exponent, 1);
}

}  // namespace pathprune
