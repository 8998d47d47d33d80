// The keys of sampling on the CPU.

#include "ops/gumbel.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <sstream>

#include "glue/cpu.h"
#include "glue/cpu_ops.h"

namespace pathprune {
namespace {

// A score that is negative or NaN, for the error that refuses it.
template <typename W>
double refused_of(const void* data, int64_t count) {
  const W* scores = static_cast<const W*>(data);
  return widen(*std::find_if(scores, scores + count, [](W score) { return !(widen(score) >= 0); }));
}

}  // namespace

Tensor gumbel_keys(const Tensor& scores, int64_t exponent, double temperature_inverse, int64_t seed,
                   int64_t offset) {
  const char* op = "gumbel_keys";
  const Storage storage = check_storage(op, "scores", scores);
  check_at_least(op, "offset", offset, 0);
  if (!(temperature_inverse >= 0 && std::isfinite(temperature_inverse))) {
    refuse(op, "temperature_inverse", "a finite number >= 0", std::to_string(temperature_inverse));
  }
  const Tensor given = torch::stable::contiguous(scores);
  const Tensor keys = torch::stable::new_empty(given, given.sizes(), ScalarType::Double);
  const GumbelKeys key_of = {exponent, temperature_inverse, static_cast<uint64_t>(seed),
                             static_cast<uint64_t>(offset)};
  constexpr int64_t kGrain = 1 << 12;
  std::atomic<bool> refuses = false;
  torch::stable::parallel_for(0, given.numel(), kGrain, [&](int64_t begin, int64_t end) {
    if (PP_BY_ISA(fill_keys)(given.const_data_ptr(), storage, begin, end - begin, key_of,
                             data_of<double>(keys))) {
      refuses = true;
    }
  });
  if (refuses) {
    const auto find = storage == Storage::kFloat32    ? refused_of<float>
                      : storage == Storage::kFloat64  ? refused_of<double>
                      : storage == Storage::kBfloat16 ? refused_of<Bfloat16>
                                                      : refused_of<Float16>;
    const double refused = find(given.const_data_ptr(), given.numel());
    std::ostringstream got;
    got << refused;
    refuse(op, "scores", "numbers >= 0", std::isnan(refused) ? "nan" : got.str());
  }
  return keys;
}

}  // namespace pathprune
