// The ops on sparse weights on CUDA: csrc/ops/sparse.cu, tiled.cu and tiled_sample.cu. What is not
// registered here - the index, and weights gathered and written out - torch does itself, by
// python/pathprune/sparse_reference.py.

#include <torch/csrc/stable/library.h>

#include "glue/cuda.h"
#include "glue/pattern.h"
#include "ops/sparse_cuda.h"
#include "ops/tiled_cuda.h"

namespace pathprune::cuda {
namespace {

const Pattern& check_columns(const char* op, const Pattern& w) {
  if (w.columns > kIndexedColumns) {
    refuse(op, "columns", "at most " + std::to_string(kIndexedColumns) + " on CUDA",
           std::to_string(w.columns));
  }
  return w;
}

// [G, T, units] <-> [G, units, T]
Tensor turned(const Tensor& flow) {
  return torch::stable::contiguous(torch::stable::transpose(flow, 1, 2));
}

Tensor sparse_matmul(const Tensor& values, const Tensor& x, int64_t f, bool transposed,
                     int64_t kernel, const Tensor& layout, const Tensor& row_start,
                     const Tensor& index, const OptionalTensor& layout_t,
                     const OptionalTensor& row_start_t, const OptionalTensor& index_t,
                     const OptionalTensor& order, int64_t columns) {
  const char* op = "sparse_matmul";
  const OnDevice device(values);
  const PatternArguments pattern(op, layout, row_start, index, layout_t, row_start_t, index_t,
                                 order, columns);
  const Pattern& w = check_columns(op, transposed ? pattern.transposed(op) : pattern.view());
  const Storage storage = check_storage(op, "values", values);
  const WeightMap map = check_map(op, "f", f);
  const bool is_double = storage == Storage::kFloat64;
  const auto type = is_double ? ScalarType::Double : ScalarType::Float;
  pattern.check_flow(op, "x", x, type, w.columns);
  pattern.check_values(op, values);
  const int64_t positions = x.size(1);
  if (kernel < 0 || kernel > 3) refuse(op, "kernel", "0 to 3", std::to_string(kernel));
  const Tensor stored = torch::stable::contiguous(values);
  if (positions < kManyPositions) {
    const Tensor in = torch::stable::contiguous(x);
    const Tensor y = new_tensor(x, {w.groups, positions, w.rows}, type);
    check(op, multiply_entries(w, stored.const_data_ptr(), storage, map, in.const_data_ptr(),
                               positions, y.mutable_data_ptr(), device.stream()));
    return y;
  }
  const Tensor in = turned(x);
  const Tensor y = new_tensor(x, {w.groups, w.rows, positions}, type);
  check(op, multiply_entries(w, stored.const_data_ptr(), storage, map, in.const_data_ptr(),
                             positions, y.mutable_data_ptr(), device.stream()));
  return turned(y);
}

Tensor sparse_sample(const Tensor& x, const Tensor& g, const Tensor& layout,
                     const Tensor& row_start, const Tensor& index, const OptionalTensor& layout_t,
                     const OptionalTensor& row_start_t, const OptionalTensor& index_t,
                     const OptionalTensor& order, int64_t columns) {
  const char* op = "sparse_sample";
  const OnDevice device(x);
  const PatternArguments pattern(op, layout, row_start, index, layout_t, row_start_t, index_t,
                                 order, columns);
  const Pattern& w = check_columns(op, pattern.view());
  const auto type = x.scalar_type();
  if (type != ScalarType::Float && type != ScalarType::Double) {
    refuse(op, "x", "float32 or float64", describe(x));
  }
  pattern.check_flow(op, "x", x, type, w.columns);
  pattern.check_flow(op, "g", g, type, w.rows);
  if (x.size(1) != g.size(1)) {
    refuse(op, "g", "T = " + std::to_string(x.size(1)) + ", as x", describe(g));
  }
  const Tensor sums = new_tensor(x, {pattern.stored()}, type);
  const Tensor from = turned(x), at = turned(g);
  check(op,
        sample_entries(w, type == ScalarType::Double, from.const_data_ptr(), at.const_data_ptr(),
                       x.size(1), sums.mutable_data_ptr(), device.stream()));
  return sums;
}

Tensor sparse_gather(const Tensor& dense, const Tensor& layout, const Tensor& row_start,
                     const Tensor& index, int64_t columns) {
  const char* op = "sparse_gather";
  const OnDevice device(dense);
  const PatternArguments pattern(op, layout, row_start, index, std::nullopt, std::nullopt,
                                 std::nullopt, std::nullopt, columns);
  const Pattern& w = pattern.view();
  const Storage storage = check_storage(op, "dense", dense);
  check_tensor(op, "dense", dense, dense.scalar_type(), {w.groups, w.rows, columns}, layout);
  const Tensor from = torch::stable::contiguous(dense);
  const Tensor values = new_tensor(dense, {pattern.stored()}, dense.scalar_type());
  check(op, gather_entries(w, storage, from.const_data_ptr(), values.mutable_data_ptr(),
                           device.stream()));
  return values;
}

Tensor sparse_scatter(const Tensor& values, const Tensor& layout, const Tensor& row_start,
                      const Tensor& index, int64_t columns) {
  const char* op = "sparse_scatter";
  const OnDevice device(values);
  const PatternArguments pattern(op, layout, row_start, index, std::nullopt, std::nullopt,
                                 std::nullopt, std::nullopt, columns);
  const Pattern& w = pattern.view();
  const Storage storage = check_storage(op, "values", values);
  pattern.check_values(op, values);
  const Tensor stored = torch::stable::contiguous(values);
  const Tensor dense = new_tensor(values, {w.groups, w.rows, columns}, values.scalar_type());
  check(op, write_entries_out(w, storage, stored.const_data_ptr(), dense.mutable_data_ptr(),
                              device.stream()));
  return dense;
}

void check_counted(const char* op, const char* argument, int64_t length) {
  if (length <= kMostCounted) return;
  refuse(op, argument, "sides of at most " + std::to_string(kMostCounted) + " on CUDA",
         std::to_string(length));
}

// Contiguous, every row made of whole vectors: where it is not, a copy with zeros behind each row.
Tensor in_vectors(const Tensor& given) {
  const Tensor tensor = torch::stable::contiguous(given);
  const int64_t of_vector = kVectorBytes / static_cast<int64_t>(tensor.element_size());
  const int64_t missing = (of_vector - tensor.size(2) % of_vector) % of_vector;
  if (missing > 0) return torch::stable::pad(tensor, {0, missing});
  const auto place = reinterpret_cast<uintptr_t>(tensor.const_data_ptr());
  return place % kVectorBytes == 0 ? tensor : torch::stable::clone(tensor);
}

// The arguments that say how a masked weight lies, contiguous for as long as this lives.
class TiledArguments {
 public:
  TiledArguments(const char* op, const Tensor& values, const char* name, const Tensor& layout,
                 const OptionalTensor& index, const OptionalTensor& tile_start, int64_t columns)
      : layout_(torch::stable::contiguous(layout)) {
    check_at_least(op, "columns", columns, 0);
    if (layout.dim() != 3) refuse(op, "layout", "3 dimensions [G, O, W]", describe(layout));
    const int64_t groups = layout.size(0), rows = layout.size(1);
    const int64_t words = words_of(columns), stretches = stretches_of_row(columns);
    check_tensor(op, "layout", layout, ScalarType::Short, {groups, rows, words}, values);
    const Storage storage = check_storage(op, name, values);
    if (storage == Storage::kFloat64) {
      refuse(op, name, "float32, bfloat16 or float16 on CUDA", describe(values));
    }
    if (index.has_value() != tile_start.has_value()) {
      refuse(op, "tile_start", "index and tile_start, or neither", index ? "None" : "no index");
    }
    if (tile_start) {
      check_tensor(op, "tile_start", *tile_start, ScalarType::Int, {groups * rows * stretches + 1},
                   layout);
      tile_start_ = torch::stable::contiguous(*tile_start);
      if (index->dim() != 1) refuse(op, "index", "1 dimension [stored]", describe(*index));
      check_tensor(op, "index", *index, ScalarType::Short, {index->size(0)}, layout);
      index_ = torch::stable::contiguous(*index);
    }
    view_ = {nullptr,
             storage,
             static_cast<const uint16_t*>(layout_.const_data_ptr()),
             data_or_null<uint16_t>(index_),
             data_or_null<int32_t>(tile_start_),
             groups,
             rows,
             columns,
             words,
             stretches,
             columns};
    for (const int64_t length : {rows, columns}) check_counted(op, "layout", length);
  }

  // Refuses a flow [groups, T, units] that is not of this type.
  void check_flow(const char* op, const char* name, const Tensor& flow, ScalarType type,
                  int64_t units) const {
    if (flow.dim() != 3) refuse(op, name, "3 dimensions [G, T, units]", describe(flow));
    check_tensor(op, name, flow, type, {view_.groups, flow.size(1), units}, layout_);
    check_counted(op, name, flow.size(1));
  }

  bool is_packed() const { return tile_start_.has_value(); }
  // Of packed weights.
  int64_t stored() const { return index_->size(0); }
  const MaskedWeight& view() const { return view_; }

 private:
  Tensor layout_;
  OptionalTensor index_, tile_start_;
  MaskedWeight view_;
};

// Computes a result in parts of its depth, which are added up.
template <typename Compute>
void in_parts(const char* op, const MaskedWeight& w, int64_t parts, const Tensor& made,
              int64_t count, const OnDevice& device, const Compute& compute) {
  if (parts == 1) {
    check(op, compute(nullptr));
    return;
  }
  const Tensor of_parts = new_tensor(made, {parts, count}, ScalarType::Float);
  check(op, compute(data_of<float>(of_parts)));
  check(op, add_parts(w.storage, data_of<float>(of_parts), parts, count, made.mutable_data_ptr(),
                      device.stream()));
}

Tensor tiled_matmul(const Tensor& weight, const Tensor& x, bool transposed, const Tensor& layout,
                    const OptionalTensor& index, const OptionalTensor& tile_start,
                    int64_t columns) {
  const char* op = "tiled_matmul";
  const OnDevice device(weight);
  const TiledArguments arguments(op, weight, "weight", layout, index, tile_start, columns);
  MaskedWeight w = arguments.view();
  const auto type = weight.scalar_type();
  if (arguments.is_packed()) {
    check_tensor(op, "weight", weight, type, {arguments.stored()}, layout);
  } else {
    check_tensor(op, "weight", weight, type, {w.groups, w.rows, columns}, layout);
  }
  arguments.check_flow(op, "x", x, type, transposed ? w.rows : columns);
  const bool is_packed = arguments.is_packed();
  const Tensor values = is_packed ? torch::stable::contiguous(weight) : in_vectors(weight);
  const Tensor flow = in_vectors(x);
  w.values = values.const_data_ptr();
  if (!is_packed) w.stride = values.size(2);
  const int64_t positions = x.size(1), outputs = transposed ? columns : w.rows;
  const Tensor y = new_tensor(x, {w.groups, positions, outputs}, type);
  const int64_t parts = parts_of_product(w, transposed, positions);
  in_parts(op, w, parts, y, w.groups * positions * outputs, device, [&](float* of_parts) {
    return multiply_tiled(w, transposed, flow.const_data_ptr(), positions, flow.size(2), parts,
                          of_parts, y.mutable_data_ptr(), device.stream());
  });
  return y;
}

Tensor tiled_sample(const Tensor& x, const Tensor& g, const Tensor& layout,
                    const OptionalTensor& index, const OptionalTensor& tile_start,
                    int64_t columns) {
  const char* op = "tiled_sample";
  const OnDevice device(x);
  const TiledArguments arguments(op, x, "x", layout, index, tile_start, columns);
  const MaskedWeight& w = arguments.view();
  const auto type = x.scalar_type();
  arguments.check_flow(op, "x", x, type, columns);
  arguments.check_flow(op, "g", g, type, w.rows);
  if (x.size(1) != g.size(1)) {
    refuse(op, "g", "T = " + std::to_string(x.size(1)) + ", as x", describe(g));
  }
  const Tensor from = in_vectors(x), at = in_vectors(g);
  const bool is_packed = arguments.is_packed();
  const int64_t count = is_packed ? arguments.stored() : w.groups * w.rows * columns;
  const Tensor sums =
      is_packed ? new_tensor(x, {count}, type) : new_tensor(x, {w.groups, w.rows, columns}, type);
  const int64_t positions = x.size(1), parts = parts_of_sample(w, positions);
  in_parts(op, w, parts, sums, count, device, [&](float* of_parts) {
    const Sampled of = {from.const_data_ptr(), at.const_data_ptr(), positions, from.size(2),
                        at.size(2)};
    return sample_tiled(w, of, parts, count, of_parts, sums.mutable_data_ptr(), device.stream());
  });
  return sums;
}

}  // namespace
}  // namespace pathprune::cuda

STABLE_TORCH_LIBRARY_IMPL(pathprune, CUDA, m) {
  m.impl("sparse_matmul", TORCH_BOX(&pathprune::cuda::sparse_matmul));
  m.impl("sparse_sample", TORCH_BOX(&pathprune::cuda::sparse_sample));
  m.impl("sparse_gather", TORCH_BOX(&pathprune::cuda::sparse_gather));
  m.impl("sparse_scatter", TORCH_BOX(&pathprune::cuda::sparse_scatter));
  m.impl("tiled_matmul", TORCH_BOX(&pathprune::cuda::tiled_matmul));
  m.impl("tiled_sample", TORCH_BOX(&pathprune::cuda::tiled_sample));
}
