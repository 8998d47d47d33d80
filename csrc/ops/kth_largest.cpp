// The k-th largest of many values on the CPU. A sample tells between which two numbers it lies, one
// read of the values counts those above and collects those between, and these few are searched.

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <optional>

#include "glue/cpu.h"
#include "glue/cpu_ops.h"

namespace pathprune {
namespace {

constexpr int64_t kSample = 4096;
constexpr int64_t kFew = 4 * kSample;  // up to here a sample costs more than it saves

// Reorders the values.
template <typename A>
A search(A* values, int64_t count, int64_t k) {
  std::nth_element(values, values + (k - 1), values + count, std::greater<A>());
  return values[k - 1];
}

// Numbers between which the k-th largest almost surely lies: a sample's quantiles, four standard
// deviations apart from the one that is wanted.
template <typename A>
Bracket<A> guess(const A* values, int64_t count, int64_t k) {
  A sample[kSample];
  for (int64_t i = 0; i < kSample; ++i) sample[i] = values[i * (count / kSample) + i % 4];
  const double share = static_cast<double>(k) / static_cast<double>(count);
  const double place = share * kSample;
  const double spread = 4 * std::sqrt(place * (1 - share)) + 2;
  Bracket<A> bracket = {-std::numeric_limits<A>::infinity(), std::numeric_limits<A>::infinity()};
  if (place + spread < kSample) {
    bracket.lo = search(sample, kSample, static_cast<int64_t>(place + spread) + 1);
  }
  if (place - spread > 1)
    bracket.hi = search(sample, kSample, static_cast<int64_t>(place - spread));
  return bracket;
}

template <typename A>
A find(const Tensor& values, Storage storage, int64_t k);

// Nothing if the guess was wrong, or so many values are equal that it could not be right.
template <typename A>
std::optional<A> find_by_guess(const Tensor& values, Storage storage, int64_t k) {
  const int64_t count = values.size(0);
  const A* data = static_cast<const A*>(values.const_data_ptr());
  const Bracket<A> bracket = guess(data, count, k);
  CollectionTensors<A> collection(values, values.scalar_type(), bracket.lo, bracket.hi, count / 4);
  const ScoreFlows<A> flows = {WeightMap::kIdentity, false, nullptr, nullptr, 0, 0};
  const auto kernels = PP_BY_ISA(through_flow_kernels<A>)();
  const Weights row = {data, storage, nullptr, nullptr, nullptr, 1, 1, count, words_of(count)};
  for (const Weights& part : cut_row(row)) {
    collection.add_blocks(row_grid(part), [&](const Block& block) {
      return kernels.collect(part, block, flows, collection.view());
    });
  }
  auto [found, counts, extremes] = collection.results();
  const int64_t above = data_of<int64_t>(counts)[0], inside = data_of<int64_t>(counts)[1];
  if (k <= above || k > above + inside) return std::nullopt;
  const double* ends = data_of<double>(extremes);
  if (ends[0] == ends[1]) return static_cast<A>(ends[0]);
  if (inside > found.size(0)) return std::nullopt;
  return find<A>(torch::stable::narrow(found, 0, 0, inside), storage, k - above);
}

template <typename A>
A find(const Tensor& values, Storage storage, int64_t k) {
  if (values.size(0) > kFew) {
    if (const std::optional<A> found = find_by_guess<A>(values, storage, k)) return *found;
  }
  const Tensor copy = torch::stable::clone(values);
  return search(data_of<A>(copy), values.size(0), k);
}

}  // namespace

Tensor kth_largest(const Tensor& values, int64_t k) {
  const char* op = "kth_largest";
  if (values.dim() != 1) refuse(op, "values", "1 dimension", describe(values));
  const Storage storage = check_storage(op, "values", values);
  if (k < 1 || k > values.size(0)) {
    refuse(op, "k", "1 to " + std::to_string(values.size(0)), std::to_string(k));
  }
  if (storage == Storage::kBfloat16 || storage == Storage::kFloat16) {
    const Tensor wide = torch::stable::to(values, ScalarType::Float);
    return torch::stable::to(kth_largest(wide, k), values.scalar_type());
  }
  const Tensor whole = torch::stable::contiguous(values);
  const Tensor result = new_tensor(values, {}, values.scalar_type());
  if (storage == Storage::kFloat64) {
    *data_of<double>(result) = find<double>(whole, storage, k);
  } else {
    *data_of<float>(result) = find<float>(whole, storage, k);
  }
  return result;
}

}  // namespace pathprune
