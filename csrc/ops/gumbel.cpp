// The keys of sampling on the CPU.

#include "ops/gumbel.h"

#include <atomic>
#include <cmath>
#include <optional>
#include <sstream>

#include "glue/cpu.h"
#include "glue/cpu_ops.h"

namespace pathprune {
namespace {

// Returns a score that is negative or NaN, if there is any.
template <typename W>
std::optional<double> fill_keys(const void* data, int64_t count, const GumbelKeys& key_of,
                                double* keys) {
  const W* scores = static_cast<const W*>(data);
  std::atomic<int64_t> refused = -1;
  constexpr int64_t kGrain = 1 << 12;
  torch::stable::parallel_for(0, count, kGrain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const double score = widen(scores[i]);
      if (!(score >= 0)) refused = i;
      keys[i] = key_of(score, i);
    }
  });
  if (refused < 0) return std::nullopt;
  return widen(scores[refused]);
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
  const auto fill = storage == Storage::kFloat32    ? fill_keys<float>
                    : storage == Storage::kFloat64  ? fill_keys<double>
                    : storage == Storage::kBfloat16 ? fill_keys<Bfloat16>
                                                    : fill_keys<Float16>;
  const std::optional<double> refused =
      fill(given.const_data_ptr(), given.numel(), key_of, data_of<double>(keys));
  if (refused) {
    std::ostringstream got;
    got << *refused;
    refuse(op, "scores", "numbers >= 0", std::isnan(*refused) ? "nan" : got.str());
  }
  return keys;
}

}  // namespace pathprune
