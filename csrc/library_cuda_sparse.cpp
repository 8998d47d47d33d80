// The ops on sparse weights on CUDA: csrc/ops/sparse.cu. What is not registered here - the index,
// and weights gathered and written out - torch does itself, by
// python/pathprune/sparse_reference.py.

#include <torch/csrc/stable/library.h>

#include "glue/cuda.h"
#include "glue/pattern.h"
#include "glue/shifted_arguments.h"
#include "ops/shifted_cuda.h"
#include "ops/sparse_cuda.h"

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

Tensor shifted_matmul(const Tensor& w, const Tensor& shift, const Tensor& x, int64_t length) {
  const char* op = "shifted_matmul";
  const OnDevice device(x);
  const ShiftedArguments p(op, w, shift, x, length);
  const auto type = x.scalar_type();
  const Tensor y = new_tensor(x, {p.rows, length}, type);
  check(op, multiply_shifted(type == ScalarType::Double, p.w.const_data_ptr(),
                             static_cast<const int64_t*>(p.shift.const_data_ptr()), p.rows,
                             p.columns, p.x.const_data_ptr(), x.size(0), length,
                             y.mutable_data_ptr(), device.stream()));
  return y;
}

}  // namespace
}  // namespace pathprune::cuda

STABLE_TORCH_LIBRARY_IMPL(pathprune, CUDA, m) {
  m.impl("sparse_matmul", TORCH_BOX(&pathprune::cuda::sparse_matmul));
  m.impl("sparse_sample", TORCH_BOX(&pathprune::cuda::sparse_sample));
  m.impl("shifted_matmul", TORCH_BOX(&pathprune::cuda::shifted_matmul));
}
