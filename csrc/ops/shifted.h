// A product with a matrix that is mostly zeros, whose columns are shifts of one row of numbers:
// y[r, t] = sum_k w[r, k] x[shift[k] + t]. A convolution is one, over images laid flat with their
// padding: the k-th kernel entry reads what the output reads, a fixed way further on.

#pragma once

#include <cstdint>

namespace pathprune {

// Rows of weights without their zeros: row r has entries start[r] .. start[r + 1] - 1.
template <typename A>
struct ShiftedRows {
  const int64_t* start;
  const A* values;
  const int64_t* shifts;  // [entries]
};

template <typename A>
struct ShiftedKernels {
  int64_t tile;  // positions that are made at once
  // Writes the entries of row `columns` long, and returns how many there are.
  int64_t (*compact)(const A* row, const int64_t* shift, int64_t columns, A* values,
                     int64_t* shifts);
  // y[r * length + t] for rows begin .. end - 1 and positions first .. first + count - 1; count is
  // `tile` or less.
  void (*multiply)(const ShiftedRows<A>& w, int64_t begin, int64_t end, const A* x, int64_t first,
                   int64_t count, int64_t length, A* y);
};

#define PP_DECLARE_KERNELS(isa)        \
  namespace isa {                      \
  template <typename A>                \
  ShiftedKernels<A> shifted_kernels(); \
  }
PP_DECLARE_KERNELS(baseline)
#if defined(PATHPRUNE_X86)
PP_DECLARE_KERNELS(avx2)
PP_DECLARE_KERNELS(avx512)
#endif
#undef PP_DECLARE_KERNELS

}  // namespace pathprune
