#include "glue/shifted_arguments.h"

#include <algorithm>

namespace pathprune {

ShiftedArguments::ShiftedArguments(const char* op, const Tensor& weight, const Tensor& shifts,
                                   const Tensor& flat, int64_t count)
    : length(count) {
  check_at_least(op, "length", length, 0);
  if (weight.dim() != 2) refuse(op, "w", "2 dimensions [rows, columns]", describe(weight));
  if (flat.dim() != 1) refuse(op, "x", "1 dimension", describe(flat));
  const auto type = flat.scalar_type();
  if (type != ScalarType::Float && type != ScalarType::Double) {
    refuse(op, "x", "float32 or float64", describe(flat));
  }
  rows = weight.size(0);
  columns = weight.size(1);
  check_tensor(op, "w", weight, type, {rows, columns}, flat);
  check_tensor(op, "shift", shifts, ScalarType::Long, {columns}, flat);
  w = torch::stable::contiguous(weight);
  shift = torch::stable::contiguous(shifts);
  x = torch::stable::contiguous(flat);
  if (columns == 0 || !shift.is_cpu()) return;  // on the CPU its numbers can be looked at
  const auto* first = static_cast<const int64_t*>(shift.const_data_ptr());
  const auto [low, high] = std::minmax_element(first, first + columns);
  if (*low < 0 || *high + length > x.size(0)) {
    refuse(op, "shift", "0 to " + std::to_string(x.size(0) - length) + " (x less length)",
           std::to_string(*low) + " to " + std::to_string(*high));
  }
}

}  // namespace pathprune
