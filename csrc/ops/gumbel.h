// The keys of sampling without replacement: the k largest of tau * ln(score) + Gumbel noise are k
// successive draws with probability proportional to score^tau (Gumbel top-k; Kool, van Hoof and
// Welling, "Stochastic beams and where to find them", ICML 2019).

#pragma once

#include <cmath>
#include <cstdint>

#include "core/isa.h"
#include "core/macros.h"
#include "core/natural_log.h"
#include "core/philox.h"
#include "ops/weights.h"

namespace pathprune {

struct GumbelKeys {
  int64_t exponent;            // a score stands for score * 2^exponent
  double temperature_inverse;  // tau
  uint64_t seed;
  uint64_t offset;  // of the counter: weight n draws from counter offset + n

  // -inf for a score of 0 or one that is refused, inf for an infinite one, whatever tau.
  PP_HD double operator()(double score, int64_t index) const {
    constexpr double kLn2 = 0.6931471805599453;
    constexpr double kInfinity = static_cast<double>(INFINITY);
    const bool is_positive = score > 0, is_finite = score < kInfinity;
    const double plain = is_positive & is_finite ? score : 1.0;
    const double u = uniform53(philox(seed, offset + static_cast<uint64_t>(index)));
    const double log_score = fma(static_cast<double>(exponent), kLn2, natural_log(plain));
    const double key = fma(temperature_inverse, log_score, -natural_log(-natural_log(u)));
    const double other = is_positive ? kInfinity : -kInfinity;
    return is_positive & is_finite ? key : other;
  }
};

// Keys of scores from `first` on; whether some are negative or NaN.
PP_IN_EVERY_ISA(bool fill_keys(const void* scores, Storage storage, int64_t first, int64_t count,
                               const GumbelKeys& key_of, double* keys);)

}  // namespace pathprune
