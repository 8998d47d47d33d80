// Products with shifts of one row on CUDA: csrc/ops/shifted.cu.

#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace pathprune::cuda {

// y[r, t] = sum_k w[r, k] x[shift[k] + t]; `void*` is float32 or float64. Reads beyond `numbers` of
// x give zero.
cudaError_t multiply_shifted(bool is_double, const void* w, const int64_t* shift, int64_t rows,
                             int64_t columns, const void* x, int64_t numbers, int64_t length,
                             void* y, cudaStream_t stream);

}  // namespace pathprune::cuda
