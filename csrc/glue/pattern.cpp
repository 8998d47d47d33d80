#include "glue/pattern.h"

namespace pathprune {
namespace {

// Asking costs less than having torch find out.
Tensor dense_in_memory(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

// On the CPU, where its numbers can be looked at.
void check_starts(const char* op, const Tensor& row_start, int64_t rows, int64_t stored) {
  if (!row_start.is_cpu()) return;
  const auto* start = static_cast<const int64_t*>(row_start.const_data_ptr());
  if (start[0] == 0 && start[rows] == stored) return;
  refuse(op, "row_start", "rows from 0 to the " + std::to_string(stored) + " entries of index",
         "rows from " + std::to_string(start[0]) + " to " + std::to_string(start[rows]));
}

}  // namespace

PatternArguments::PatternArguments(const char* op, const Tensor& layout, const Tensor& row_start,
                                   const Tensor& index, const OptionalTensor& layout_t,
                                   const OptionalTensor& row_start_t, const OptionalTensor& index_t,
                                   const OptionalTensor& order, int64_t columns)
    : layout_(dense_in_memory(layout)),
      row_start_(dense_in_memory(row_start)),
      index_(dense_in_memory(index)) {
  check_at_least(op, "columns", columns, 0);
  if (layout.dim() != 3) refuse(op, "layout", "3 dimensions [G, O, W]", describe(layout));
  if (index.dim() != 1) refuse(op, "index", "1 dimension [stored]", describe(index));
  const int64_t groups = layout.size(0), rows = layout.size(1), stored = index.size(0);
  check_tensor(op, "layout", layout, ScalarType::Short, {groups, rows, words_of(columns)}, layout);
  check_tensor(op, "row_start", row_start, ScalarType::Long, {groups * rows + 1}, layout);
  check_tensor(op, "index", index, ScalarType::Short, {stored}, layout);
  check_starts(op, row_start_, groups * rows, stored);
  view_ = {static_cast<const uint16_t*>(layout_.const_data_ptr()),
           static_cast<const int64_t*>(row_start_.const_data_ptr()),
           static_cast<const uint16_t*>(index_.const_data_ptr()),
           nullptr,
           groups,
           rows,
           columns,
           words_of(columns)};
  transposed_ = {nullptr, nullptr, nullptr, nullptr, groups, columns, rows, words_of(rows)};
  if (!layout_t || !row_start_t || !index_t || !order) return;
  check_tensor(op, "layout_t", *layout_t, ScalarType::Short, {groups, columns, words_of(rows)},
               layout);
  check_tensor(op, "row_start_t", *row_start_t, ScalarType::Long, {groups * columns + 1}, layout);
  check_tensor(op, "index_t", *index_t, ScalarType::Short, {stored}, layout);
  check_tensor(op, "order", *order, ScalarType::Int, {stored}, layout);
  layout_t_ = dense_in_memory(*layout_t);
  row_start_t_ = dense_in_memory(*row_start_t);
  index_t_ = dense_in_memory(*index_t);
  order_ = dense_in_memory(*order);
  check_starts(op, *row_start_t_, groups * columns, stored);
  transposed_.layout = data_or_null<uint16_t>(layout_t_);
  transposed_.row_start = data_or_null<int64_t>(row_start_t_);
  transposed_.index = data_or_null<uint16_t>(index_t_);
  transposed_.order = data_or_null<int32_t>(order_);
}

const Pattern& PatternArguments::transposed(const char* op) const {
  if (!order_) {
    refuse(op, "layout_t", "layout_t, row_start_t, index_t and order to transpose with", "None");
  }
  return transposed_;
}

void PatternArguments::check_flow(const char* op, const char* argument, const Tensor& flow,
                                  ScalarType type, int64_t units) const {
  if (flow.dim() != 3) refuse(op, argument, "3 dimensions [G, T, units]", describe(flow));
  check_tensor(op, argument, flow, type, {view_.groups, flow.size(1), units}, layout_);
}

void PatternArguments::check_values(const char* op, const Tensor& values) const {
  if (values.dim() != 1 || values.size(0) < stored()) {
    refuse(op, "values", "1 dimension of at least " + std::to_string(stored()), describe(values));
  }
}

}  // namespace pathprune
