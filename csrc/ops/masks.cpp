// Mask words to and from bools, and weights packed by their mask, on the CPU.

#include <algorithm>
#include <atomic>

#include "glue/cpu.h"
#include "glue/cpu_ops.h"

namespace pathprune {
namespace {

constexpr int64_t kPadding = kWordColumns;  // values behind the last one of a packed weight

void check_mask(const char* op, const Tensor& mask) {
  if (mask.dim() != 3 || mask.scalar_type() != ScalarType::Short) {
    refuse(op, "mask", "int16 [G, O, W]", describe(mask));
  }
}

// Calls visit(row) for every row, on torch's threads.
template <typename Visit>
void for_each_row(int64_t rows, int64_t columns, const Visit& visit) {
  const int64_t grain = std::max<int64_t>(1, kBlockWeights / std::max<int64_t>(1, columns));
  torch::stable::parallel_for(0, rows, grain, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) visit(row);
  });
}

}  // namespace

Tensor mask_pack(const Tensor& bits) {
  if (bits.dim() != 3 || bits.scalar_type() != ScalarType::Bool) {
    refuse("mask_pack", "bits", "bool [G, O, K]", describe(bits));
  }
  const Tensor bools = torch::stable::contiguous(bits);
  const int64_t groups = bits.size(0), rows = bits.size(1), columns = bits.size(2);
  const int64_t words = words_of(columns);
  const Tensor mask = new_tensor(bits, {groups, rows, words}, ScalarType::Short);
  const auto kernels = PP_BY_ISA(mask_kernels)();
  for_each_row(groups * rows, columns, [&](int64_t row) {
    kernels.pack(static_cast<const uint8_t*>(bools.const_data_ptr()) + row * columns, columns,
                 data_of<uint16_t>(mask) + row * words);
  });
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
  const Tensor whole = torch::stable::contiguous(mask);
  const Tensor bits = new_tensor(mask, {groups, rows, columns}, ScalarType::Bool);
  const auto kernels = PP_BY_ISA(mask_kernels)();
  for_each_row(groups * rows, columns, [&](int64_t row) {
    kernels.unpack(static_cast<const uint16_t*>(whole.const_data_ptr()) + row * words, columns,
                   static_cast<uint8_t*>(bits.mutable_data_ptr()) + row * columns);
  });
  return bits;
}

Tensor mask_count(const Tensor& mask) {
  check_mask("mask_count", mask);
  const Tensor whole = torch::stable::contiguous(mask);
  const Tensor count = new_tensor(mask, {}, ScalarType::Long);
  const auto* words = static_cast<const uint16_t*>(whole.const_data_ptr());
  const auto kernels = PP_BY_ISA(mask_kernels)();
  std::atomic<int64_t> total = 0;
  torch::stable::parallel_for(0, whole.numel(), kBlockWeights, [&](int64_t begin, int64_t end) {
    total += kernels.count(words + begin, end - begin);
  });
  *data_of<int64_t>(count) = total;
  return count;
}

std::tuple<Tensor, Tensor> compact_weight(const Tensor& weight, const Tensor& mask,
                                          const OptionalTensor& layout,
                                          const OptionalTensor& row_start, int64_t columns) {
  const WeightArguments arguments("compact_weight", weight, mask, layout, row_start, columns);
  const Weights& w = arguments.view();
  const auto kernels = PP_BY_ISA(mask_kernels)();
  const int64_t rows = w.groups * w.rows;
  const Tensor starts = new_tensor(weight, {rows + 1}, ScalarType::Long);
  int64_t* start = data_of<int64_t>(starts);
  start[0] = 0;
  for_each_row(rows, columns, [&](int64_t row) {
    start[row + 1] = kernels.count(w.mask + row * w.words, w.words);
  });
  for (int64_t row = 0; row < rows; ++row) start[row + 1] += start[row];
  const int64_t live = start[rows];
  const Tensor values = new_tensor(weight, {live + kPadding}, weight.scalar_type());
  const auto size = static_cast<int64_t>(values.element_size());
  char* bytes = static_cast<char*>(values.mutable_data_ptr());
  for_each_row(rows, columns,
               [&](int64_t row) { kernels.compact(w, row, bytes + start[row] * size); });
  std::fill(bytes + live * size, bytes + (live + kPadding) * size, 0);
  return {values, starts};
}

}  // namespace pathprune
