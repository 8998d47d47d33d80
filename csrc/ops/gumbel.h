// The keys of sampling without replacement: the k largest of tau * ln(score) + Gumbel noise are k
// successive draws with probability proportional to score^tau (Gumbel top-k; Kool, van Hoof and
// Welling, "Stochastic beams and where to find them", ICML 2019).

#pragma once

#include <cmath>
#include <cstdint>

#include "core/macros.h"
#include "core/philox.h"

namespace pathprune {

struct GumbelKeys {
  int64_t exponent;            // a score stands for score * 2^exponent
  double temperature_inverse;  // tau
  uint64_t seed;
  uint64_t offset;  // of the counter: weight n draws from counter offset + n

  // -inf for a score of 0, whatever tau.
  PP_HD double operator()(double score, int64_t index) const {
    constexpr double kLn2 = 0.6931471805599453;
    if (score == 0) return -INFINITY;
    const double u = uniform53(philox(seed, offset + static_cast<uint64_t>(index)));
    const double log_score = log(score) + static_cast<double>(exponent) * kLn2;
    return temperature_inverse * log_score - log(-log(u));
  }
};

}  // namespace pathprune
