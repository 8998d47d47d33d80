// Gumbel keys, compiled for each instruction set: scores lie in the lanes.

#include "ops/gumbel.h"

#include <algorithm>

namespace pathprune::PATHPRUNE_ISA {
namespace {

template <typename W>
bool fill(const W* scores, int64_t first, int64_t count, const GumbelKeys& key_of, double* keys) {
  constexpr int64_t kAtOnce = 64;
  double score[kAtOnce], key[kAtOnce];
  int refused = 0;
  for (int64_t begin = 0; begin < count; begin += kAtOnce) {
    const int64_t here = std::min(kAtOnce, count - begin);
    for (int64_t i = 0; i < kAtOnce; ++i)
      score[i] = i < here ? widen(scores[first + begin + i]) : 0;
    for (int64_t i = 0; i < kAtOnce; ++i) {
      refused |= !(score[i] >= 0);
      key[i] = key_of(score[i], first + begin + i);
    }
    std::copy_n(key, here, keys + first + begin);
  }
  return refused != 0;
}

}  // namespace

bool fill_keys(const void* scores, Storage storage, int64_t first, int64_t count,
               const GumbelKeys& key_of, double* keys) {
  switch (storage) {
    case Storage::kFloat32:
      return fill(static_cast<const float*>(scores), first, count, key_of, keys);
    case Storage::kFloat64:
      return fill(static_cast<const double*>(scores), first, count, key_of, keys);
    case Storage::kBfloat16:
      return fill(static_cast<const Bfloat16*>(scores), first, count, key_of, keys);
    default:
      return fill(static_cast<const Float16*>(scores), first, count, key_of, keys);
  }
}

}  // namespace pathprune::PATHPRUNE_ISA
