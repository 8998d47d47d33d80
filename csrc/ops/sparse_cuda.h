// Products with sparse weights on CUDA: csrc/ops/sparse.cu. A is float64 for float64 values,
// float32 for all others; `void*` is either. Columns are at most 2^16.

#pragma once

#include <cuda_runtime.h>

#include "ops/sparse.h"

namespace pathprune::cuda {

// From so many positions on they lie in the lanes, and flows are read position last.
inline constexpr int64_t kManyPositions = 16;

// y[g, t, r] = sum_c f(w[r, c]) x[g, t, c]: x [G, T, K], y [G, T, O]; for many positions x
// [G, K, T], y [G, O, T].
cudaError_t multiply_entries(const Pattern& w, const void* values, Storage storage, WeightMap f,
                             const void* x, int64_t positions, void* y, cudaStream_t stream);

// sums[i] = sum_t g[r, t] x[c, t] for every entry i: x [G, K, T] and g [G, O, T] in A.
cudaError_t sample_entries(const Pattern& w, bool is_double, const void* x, const void* g,
                           int64_t positions, void* sums, cudaStream_t stream);

// dense [G, O, K] = the values at the entries, zeros elsewhere; and values [stored] = dense at the
// entries. Any number of columns; index and order are not looked at.
cudaError_t write_entries_out(const Pattern& w, Storage storage, const void* values, void* dense,
                              cudaStream_t stream);
cudaError_t gather_entries(const Pattern& w, Storage storage, const void* dense, void* values,
                           cudaStream_t stream);

}  // namespace pathprune::cuda
