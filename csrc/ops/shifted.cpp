// Products with shifts of one row on the CPU. Every sum is formed by one thread, entry after entry.

#include "ops/shifted.h"

#include <algorithm>

#include "glue/cpu.h"
#include "glue/cpu_ops.h"
#include "glue/shifted_arguments.h"

namespace pathprune {
namespace {

int64_t ceil_divide(int64_t a, int64_t b) { return (a + b - 1) / b; }

// So many rows share a tile of what is read before the next is begun.
constexpr int64_t kRowsAtOnce = 64;

template <typename A>
void multiply_all(const ShiftedArguments& p, const Tensor& y) {
  const auto kernels = PP_BY_ISA(shifted_kernels<A>)();
  const A* weight = static_cast<const A*>(p.w.const_data_ptr());
  const auto* shift = static_cast<const int64_t*>(p.shift.const_data_ptr());
  const Tensor start = new_tensor(p.shift, {p.rows + 1}, ScalarType::Long);
  const Tensor shifts = new_tensor(p.shift, {p.rows * p.columns + 1}, ScalarType::Long);
  const Tensor values = new_tensor(p.w, {p.rows * p.columns + 1}, p.w.scalar_type());
  auto* starts = data_of<int64_t>(start);
  starts[0] = 0;
  for (int64_t r = 0; r < p.rows; ++r) {
    starts[r + 1] = starts[r] + kernels.compact(weight + r * p.columns, shift, p.columns,
                                                data_of<A>(values) + starts[r],
                                                data_of<int64_t>(shifts) + starts[r]);
  }
  const ShiftedRows<A> rows = {starts, data_of<A>(values), data_of<int64_t>(shifts)};
  const auto* x = static_cast<const A*>(p.x.const_data_ptr());
  const int64_t tiles = ceil_divide(p.length, kernels.tile);
  torch::stable::parallel_for(0, tiles, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i * kernels.tile;
      const int64_t count = std::min(kernels.tile, p.length - first);
      for (int64_t r = 0; r < p.rows; r += kRowsAtOnce) {
        kernels.multiply(rows, r, std::min(p.rows, r + kRowsAtOnce), x, first, count, p.length,
                         data_of<A>(y));
      }
    }
  });
}

}  // namespace

Tensor shifted_matmul(const Tensor& w, const Tensor& shift, const Tensor& x, int64_t length) {
  const ShiftedArguments p("shifted_matmul", w, shift, x, length);
  const Tensor y = new_tensor(x, {p.rows, length}, x.scalar_type());
  if (p.rows == 0 || length == 0) return y;
  if (x.scalar_type() == ScalarType::Double) {
    multiply_all<double>(p, y);
  } else {
    multiply_all<float>(p, y);
  }
  return y;
}

}  // namespace pathprune
