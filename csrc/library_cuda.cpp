// The ops on CUDA: arguments are checked as on the CPU, torch allocates, csrc/ops/*.cu computes,
// all on the current stream of the weight's device. python/pathprune/ops.py says what each op does.
//
// Two ops wait for the device, because the host must know what it found: compact_weight (how many
// values there are) and gumbel_keys (whether a score is refused). No other op here does; those of
// walks, in library_cuda_walk.cpp, do.

#include <cuda_runtime.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cmath>
#include <optional>
#include <sstream>
#include <string>
#include <tuple>

#include "core/float_key.h"
#include "glue/arguments.h"
#include "glue/cuda.h"
#include "ops/kernels_cuda.h"

namespace pathprune::cuda {
namespace {

constexpr int64_t kPadding = 16;  // values behind the last one of a packed weight

// Where the tiles of packed rows begin, for as long as this lives.
class TileStarts {
 public:
  TileStarts(const char* op, const Tensor& like, const Weights& w, const uint16_t* words,
             const int64_t* row_start, cudaStream_t stream)
      : tensor_(new_integers(like, tile_start_count(w.groups * w.rows, w.words))) {
    first_ = row_start;
    if (tensor_.numel() == 0) return;
    check(op, fill_tile_starts(words, row_start, w.groups * w.rows, w.columns, w.words,
                               data_of<int64_t>(tensor_), stream));
    first_ = data_of<int64_t>(tensor_);
  }

  const int64_t* first() const { return first_; }

 private:
  Tensor tensor_;
  const int64_t* first_;
};

// The arguments of an op that reads weights, on their device. Nothing is launched before stored(),
// which is for after the checks.
class Call {
 public:
  Call(const char* op, const Tensor& weight, const OptionalTensor& mask,
       const OptionalTensor& layout, const OptionalTensor& row_start, int64_t columns)
      : op_(op), device_(weight), weight_(op, weight, mask, layout, row_start, columns) {}

  const char* op() const { return op_; }
  cudaStream_t stream() const { return device_.stream(); }
  const WeightArguments& weight() const { return weight_; }
  const Weights& view() const { return weight_.view(); }

  StoredWeights stored() {
    const Weights& w = weight_.view();
    if (w.layout == nullptr) return {w, nullptr};
    starts_.emplace(op_, weight_.values(), w, w.layout, w.row_start, stream());
    return {w, starts_->first()};
  }

  void check(cudaError_t error) const { cuda::check(op_, error); }
  Tensor accumulated(std::initializer_list<int64_t> shape) const {
    return new_tensor(weight_.values(), shape, weight_.accumulate());
  }
  Tensor integers(std::initializer_list<int64_t> shape) const {
    return new_tensor(weight_.values(), shape, ScalarType::Long);
  }

 private:
  const char* op_;
  OnDevice device_;
  WeightArguments weight_;
  std::optional<TileStarts> starts_;
};

Score score_of(const ScoreArguments& score) {
  if (!score.x) return {score.s, false, nullptr, nullptr, 0};
  return {score.s, true, score.x->const_data_ptr(), score.g->const_data_ptr(), score.x->size(1)};
}

// A flow of T positions from `in` to `out`.
Flow flow_of(WeightMap f, const Tensor& in, const Tensor& out) {
  return {f, in.const_data_ptr(), out.mutable_data_ptr(), in.size(1)};
}

constexpr Flow kNoFlow = {WeightMap::kOne, nullptr, nullptr, 0};

// ---- collecting ---------------------------------------------------------------------------------

// What is collected, in the tensors that it is returned in.
struct CollectedTensors {
  CollectedTensors(const Call& call, double lo, double hi, int64_t capacity) : lo(lo), hi(hi) {
    check_not_nan(call.op(), "lo", lo);
    check_not_nan(call.op(), "hi", hi);
    check_at_least(call.op(), "capacity", capacity, 0);
    values = call.accumulated({capacity});
    counts = call.integers({4});
    extremes = new_tensor(values, {2}, ScalarType::Double);
  }

  Collected view() const {
    return {lo,
            hi,
            values.mutable_data_ptr(),
            values.size(0),
            data_of<int64_t>(counts),
            data_of<double>(extremes)};
  }

  double lo, hi;
  Tensor values, counts, extremes;
};

std::tuple<Tensor, Tensor, Tensor> through_flow_collect(
    const Tensor& weight, const OptionalTensor& mask, const OptionalTensor& x,
    const OptionalTensor& g, int64_t s, double lo, double hi, int64_t capacity,
    const OptionalTensor& layout, const OptionalTensor& row_start, int64_t columns) {
  Call call("through_flow_collect", weight, mask, layout, row_start, columns);
  const ScoreArguments score(call.op(), call.weight(), x, g, s);
  const CollectedTensors collected(call, lo, hi, capacity);
  call.check(collect_by_columns(call.stored(), score_of(score), collected.view(), kNoFlow, nullptr,
                                call.stream()));
  return {collected.values, collected.counts, collected.extremes};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> path_flow_linear_collect(
    const Tensor& weight, const OptionalTensor& mask, const Tensor& x, const Tensor& g, int64_t f,
    int64_t s, double lo, double hi, int64_t capacity, const OptionalTensor& layout,
    const OptionalTensor& row_start, int64_t columns) {
  Call call("path_flow_linear_collect", weight, mask, layout, row_start, columns);
  const ScoreArguments score(call.op(), call.weight(), x, g, s);
  const WeightMap map = check_map(call.op(), "f", f);
  const CollectedTensors collected(call, lo, hi, capacity);
  const int64_t positions = score.g->size(1);
  const Tensor gx = call.accumulated({call.view().groups, positions, columns});
  const Tensor sums = call.accumulated({column_sum_count(call.view(), positions)});
  call.check(collect_by_columns(call.stored(), score_of(score), collected.view(),
                                flow_of(map, *score.g, gx), sums.mutable_data_ptr(),
                                call.stream()));
  return {gx, collected.values, collected.counts, collected.extremes};
}

// ---- flows and pruning --------------------------------------------------------------------------

Tensor path_flow_linear(const Tensor& weight, const OptionalTensor& mask, const Tensor& x,
                        int64_t f, bool transposed, const OptionalTensor& layout,
                        const OptionalTensor& row_start, int64_t columns) {
  Call call("path_flow_linear", weight, mask, layout, row_start, columns);
  const Weights& w = call.view();
  const WeightMap map = check_map(call.op(), "f", f);
  const Tensor in = check_flow(call.op(), "x", x, call.weight(), transposed ? w.rows : columns);
  const int64_t positions = in.size(1);
  const Tensor out = call.accumulated({w.groups, positions, transposed ? columns : w.rows});
  if (!transposed) {
    call.check(flow_by_rows(call.stored(), flow_of(map, in, out), call.stream()));
    return out;
  }
  const Tensor sums = call.accumulated({column_sum_count(w, positions)});
  call.check(flow_by_columns(call.stored(), flow_of(map, in, out), sums.mutable_data_ptr(),
                             call.stream()));
  return out;
}

void through_flow_prune_(const Tensor& weight, const Tensor& mask, const OptionalTensor& x,
                         const OptionalTensor& g, int64_t s, double at_least, double above,
                         int64_t cut, const OptionalTensor& layout, const OptionalTensor& row_start,
                         int64_t columns) {
  Call call("through_flow_prune_", weight, mask, layout, row_start, columns);
  const ScoreArguments score(call.op(), call.weight(), x, g, s);
  check_not_nan(call.op(), "at_least", at_least);
  check_not_nan(call.op(), "above", above);
  call.check(prune_by_rows(call.stored(), score_of(score), at_least, above, cut,
                           check_written(call.op(), mask), kNoFlow, call.stream()));
}

Tensor path_flow_linear_prune_(const Tensor& weight, const Tensor& mask, const Tensor& x_old,
                               const Tensor& g_old, int64_t s, double at_least, double above,
                               int64_t cut, const Tensor& x, int64_t f,
                               const OptionalTensor& layout, const OptionalTensor& row_start,
                               int64_t columns) {
  Call call("path_flow_linear_prune_", weight, mask, layout, row_start, columns);
  const Weights& w = call.view();
  const ScoreArguments score(call.op(), call.weight(), x_old, g_old, s, "x_old", "g_old");
  const WeightMap map = check_map(call.op(), "f", f);
  const Tensor in = check_flow(call.op(), "x", x, call.weight(), columns);
  check_not_nan(call.op(), "at_least", at_least);
  check_not_nan(call.op(), "above", above);
  uint16_t* const written = check_written(call.op(), mask);
  const Tensor out = call.accumulated({w.groups, in.size(1), w.rows});
  call.check(prune_by_rows(call.stored(), score_of(score), at_least, above, cut, written,
                           flow_of(map, in, out), call.stream()));
  return out;
}

// ---- scores -------------------------------------------------------------------------------------

Tensor scores_of(Call& call, const ScoreArguments& score) {
  const Weights& w = call.view();
  const Tensor scores = call.accumulated({w.groups, w.rows, w.columns});
  call.check(
      write_scores(call.stored(), score_of(score), scores.mutable_data_ptr(), call.stream()));
  return scores;
}

Tensor through_flow(const Tensor& weight, const OptionalTensor& mask, const OptionalTensor& x,
                    const OptionalTensor& g, int64_t s, const OptionalTensor& layout,
                    const OptionalTensor& row_start, int64_t columns) {
  Call call("through_flow", weight, mask, layout, row_start, columns);
  return scores_of(call, ScoreArguments(call.op(), call.weight(), x, g, s));
}

Tensor masked_weight(const Tensor& weight, const OptionalTensor& mask, int64_t f) {
  const int64_t columns = weight.dim() == 3 ? weight.size(2) : 0;
  Call call("masked_weight", weight, mask, std::nullopt, std::nullopt, columns);
  check_map(call.op(), "f", f);
  return scores_of(call, ScoreArguments(call.op(), call.weight(), std::nullopt, std::nullopt, f));
}

std::tuple<Tensor, Tensor> through_flow_histogram(const Tensor& weight, const OptionalTensor& mask,
                                                  const OptionalTensor& x, const OptionalTensor& g,
                                                  int64_t s, int64_t stride,
                                                  const OptionalTensor& layout,
                                                  const OptionalTensor& row_start,
                                                  int64_t columns) {
  Call call("through_flow_histogram", weight, mask, layout, row_start, columns);
  const ScoreArguments score(call.op(), call.weight(), x, g, s);
  check_at_least(call.op(), "stride", stride, 1);
  const int bits =
      call.weight().is_double() ? FloatTraits<double>::kBinBits : FloatTraits<float>::kBinBits;
  const Tensor histogram = call.integers({int64_t{1} << bits});
  const Tensor counts = call.integers({2});
  call.check(count_by_bin(call.stored(), score_of(score), stride, data_of<int64_t>(histogram),
                          data_of<int64_t>(counts), call.stream()));
  return {histogram, counts};
}

Tensor through_flow_nth(const Tensor& weight, const OptionalTensor& mask, const OptionalTensor& x,
                        const OptionalTensor& g, int64_t s, double at_least, double above,
                        int64_t n, const OptionalTensor& layout, const OptionalTensor& row_start,
                        int64_t columns) {
  Call call("through_flow_nth", weight, mask, layout, row_start, columns);
  const ScoreArguments score(call.op(), call.weight(), x, g, s);
  check_not_nan(call.op(), "at_least", at_least);
  check_not_nan(call.op(), "above", above);
  check_at_least(call.op(), "n", n, 0);
  const Tensor counts = call.integers({nth_count_count(call.view())});
  const Tensor index = call.integers({});
  call.check(find_nth(call.stored(), score_of(score), at_least, above, n, data_of<int64_t>(counts),
                      data_of<int64_t>(index), call.stream()));
  return index;
}

// ---- masks and packing --------------------------------------------------------------------------

void check_mask(const char* op, const Tensor& mask) {
  if (mask.dim() != 3 || mask.scalar_type() != ScalarType::Short) {
    refuse(op, "mask", "int16 [G, O, W]", describe(mask));
  }
}

Tensor mask_pack(const Tensor& bits) {
  const char* op = "mask_pack";
  if (bits.dim() != 3 || bits.scalar_type() != ScalarType::Bool) {
    refuse(op, "bits", "bool [G, O, K]", describe(bits));
  }
  const OnDevice device(bits);
  const Tensor bools = torch::stable::contiguous(bits);
  const int64_t groups = bits.size(0), rows = bits.size(1), columns = bits.size(2);
  const Tensor mask = new_tensor(bits, {groups, rows, words_of(columns)}, ScalarType::Short);
  check(op, pack_masks(static_cast<const uint8_t*>(bools.const_data_ptr()), groups * rows, columns,
                       data_of<uint16_t>(mask), device.stream()));
  return mask;
}

Tensor mask_unpack(const Tensor& mask, int64_t columns) {
  const char* op = "mask_unpack";
  check_mask(op, mask);
  check_at_least(op, "columns", columns, 0);
  const int64_t groups = mask.size(0), rows = mask.size(1), words = words_of(columns);
  if (mask.size(2) != words) {
    refuse(op, "mask",
           "W = " + std::to_string(words) + " words for " + std::to_string(columns) + " columns",
           describe(mask));
  }
  const OnDevice device(mask);
  const Tensor whole = torch::stable::contiguous(mask);
  const Tensor bits = new_tensor(mask, {groups, rows, columns}, ScalarType::Bool);
  check(op, unpack_masks(static_cast<const uint16_t*>(whole.const_data_ptr()), groups * rows,
                         columns, data_of<uint8_t>(bits), device.stream()));
  return bits;
}

Tensor mask_count(const Tensor& mask) {
  const char* op = "mask_count";
  check_mask(op, mask);
  const OnDevice device(mask);
  const Tensor whole = torch::stable::contiguous(mask);
  const Tensor count = new_tensor(mask, {}, ScalarType::Long);
  check(op, count_masks(static_cast<const uint16_t*>(whole.const_data_ptr()), whole.numel(),
                        data_of<int64_t>(count), device.stream()));
  return count;
}

Tensor fingerprint(const Tensor& tensor) {
  const OnDevice device(tensor);
  const Tensor whole = torch::stable::contiguous(tensor);
  const Tensor found = new_tensor(tensor, {}, ScalarType::Long);
  const auto size = whole.numel() * static_cast<int64_t>(whole.element_size());
  check("fingerprint", add_fingerprint(static_cast<const uint8_t*>(whole.const_data_ptr()), size,
                                       data_of<int64_t>(found), device.stream()));
  return found;
}

std::tuple<Tensor, Tensor> compact_weight(const Tensor& weight, const Tensor& mask,
                                          const OptionalTensor& layout,
                                          const OptionalTensor& row_start, int64_t columns) {
  Call call("compact_weight", weight, mask, layout, row_start, columns);
  const Weights& w = call.view();
  const int64_t rows = w.groups * w.rows;
  const Tensor starts = call.integers({rows + 1});
  size_t bytes = 0;
  call.check(row_start_bytes(rows, &bytes));
  const Tensor workspace = new_bytes(weight, bytes);
  call.check(fill_row_starts(w.mask, rows, columns, w.words, workspace.mutable_data_ptr(), bytes,
                             data_of<int64_t>(starts), call.stream()));
  const int64_t live = read_one(call.op(), data_of<int64_t>(starts) + rows, call.stream());
  const Tensor values = new_tensor(weight, {live + kPadding}, weight.scalar_type());
  const TileStarts tiles(call.op(), weight, w, w.mask, data_of<int64_t>(starts), call.stream());
  call.check(compact(call.stored(), tiles.first(), live, values.mutable_data_ptr(), call.stream()));
  return {values, starts};
}

// ---- selection and chance -----------------------------------------------------------------------

Tensor kth_largest(const Tensor& values, int64_t k) {
  const char* op = "kth_largest";
  if (values.dim() != 1) refuse(op, "values", "1 dimension", describe(values));
  const Storage storage = check_storage(op, "values", values);
  if (k < 1 || k > values.size(0)) {
    refuse(op, "k", "1 to " + std::to_string(values.size(0)), std::to_string(k));
  }
  const OnDevice device(values);
  const Tensor whole = torch::stable::contiguous(values);
  const Tensor result = new_tensor(values, {}, values.scalar_type());
  const Tensor workspace = new_bytes(values, kth_largest_bytes(storage));
  check(op,
        find_kth_largest(whole.const_data_ptr(), storage, whole.numel(), k,
                         workspace.mutable_data_ptr(), result.mutable_data_ptr(), device.stream()));
  return result;
}

Tensor gumbel_keys(const Tensor& scores, int64_t exponent, double temperature_inverse, int64_t seed,
                   int64_t offset) {
  const char* op = "gumbel_keys";
  const Storage storage = check_storage(op, "scores", scores);
  check_at_least(op, "offset", offset, 0);
  if (!(temperature_inverse >= 0 && std::isfinite(temperature_inverse))) {
    refuse(op, "temperature_inverse", "a finite number >= 0", std::to_string(temperature_inverse));
  }
  const OnDevice device(scores);
  const Tensor given = torch::stable::contiguous(scores);
  const Tensor keys = torch::stable::new_empty(given, given.sizes(), ScalarType::Double);
  const Tensor refused = new_tensor(given, {}, ScalarType::Double);
  const GumbelKeys key_of = {exponent, temperature_inverse, static_cast<uint64_t>(seed),
                             static_cast<uint64_t>(offset)};
  check(op, fill_gumbel_keys(given.const_data_ptr(), storage, given.numel(), key_of,
                             data_of<double>(keys), data_of<double>(refused), device.stream()));
  const double found = read_one(op, data_of<double>(refused), device.stream());
  if (found != 0) {
    std::ostringstream got;
    got << found;
    refuse(op, "scores", "numbers >= 0", std::isnan(found) ? "nan" : got.str());
  }
  return keys;
}

}  // namespace
}  // namespace pathprune::cuda

STABLE_TORCH_LIBRARY_IMPL(pathprune, CUDA, m) {
  m.impl("path_flow_linear", TORCH_BOX(&pathprune::cuda::path_flow_linear));
  m.impl("path_flow_linear_collect", TORCH_BOX(&pathprune::cuda::path_flow_linear_collect));
  m.impl("path_flow_linear_prune_", TORCH_BOX(&pathprune::cuda::path_flow_linear_prune_));
  m.impl("through_flow", TORCH_BOX(&pathprune::cuda::through_flow));
  m.impl("through_flow_collect", TORCH_BOX(&pathprune::cuda::through_flow_collect));
  m.impl("through_flow_histogram", TORCH_BOX(&pathprune::cuda::through_flow_histogram));
  m.impl("through_flow_prune_", TORCH_BOX(&pathprune::cuda::through_flow_prune_));
  m.impl("through_flow_nth", TORCH_BOX(&pathprune::cuda::through_flow_nth));
  m.impl("masked_weight", TORCH_BOX(&pathprune::cuda::masked_weight));
  m.impl("mask_pack", TORCH_BOX(&pathprune::cuda::mask_pack));
  m.impl("mask_unpack", TORCH_BOX(&pathprune::cuda::mask_unpack));
  m.impl("mask_count", TORCH_BOX(&pathprune::cuda::mask_count));
  m.impl("fingerprint", TORCH_BOX(&pathprune::cuda::fingerprint));
  m.impl("compact_weight", TORCH_BOX(&pathprune::cuda::compact_weight));
  m.impl("kth_largest", TORCH_BOX(&pathprune::cuda::kth_largest));
  m.impl("gumbel_keys", TORCH_BOX(&pathprune::cuda::gumbel_keys));
}
