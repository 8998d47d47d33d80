// What a weight counts for on a path, and the arithmetic that scores are defined in.

#pragma once

#include "core/macros.h"

namespace pathprune {

// Codes as in the schemas. A pruned weight counts for exactly 0 under any of them.
enum class WeightMap : int {
  kOne = 0,       // 1: counts paths
  kAbs = 1,       // |w|
  kSquare = 2,    // w * w
  kIdentity = 3,  // w
};

// A product, and a sum, that is rounded on its own. nvcc would contract the two into one operation
// that rounds once, and a score would no longer be the same number on every device; host compilers
// are told not to by -ffp-contract=off.
PP_HD float times(float a, float b) {
#ifdef __CUDA_ARCH__
  return __fmul_rn(a, b);
#else
  return a * b;
#endif
}

PP_HD double times(double a, double b) {
#ifdef __CUDA_ARCH__
  return __dmul_rn(a, b);
#else
  return a * b;
#endif
}

PP_HD float plus(float a, float b) {
#ifdef __CUDA_ARCH__
  return __fadd_rn(a, b);
#else
  return a + b;
#endif
}

PP_HD double plus(double a, double b) {
#ifdef __CUDA_ARCH__
  return __dadd_rn(a, b);
#else
  return a + b;
#endif
}

PP_HD float magnitude(float a) { return __builtin_fabsf(a); }
PP_HD double magnitude(double a) { return __builtin_fabs(a); }

template <typename A>
PP_HD A map_weight(WeightMap map, A w) {
  switch (map) {
    case WeightMap::kOne:
      return A(1);
    case WeightMap::kAbs:
      return magnitude(w);
    case WeightMap::kSquare:
      return times(w, w);
    default:
      return w;
  }
}

}  // namespace pathprune
