// Products with masked weights, computed dense, on CUDA: csrc/ops/tiled.cu and tiled_sample.cu. All
// tensors have the type of the values; sums are float32.

#pragma once

#include <cuda_runtime.h>

#include "ops/tiled.h"

namespace pathprune::cuda {

// y[g, t, r] = sum_c w[r, c] x[g, t, c]: x [G, T, depth], y [G, T, O]; transposed: y[g, t, c] =
// sum_r w[r, c] x[g, t, r], y [G, T, K]. Rows of x are columns, or rows, of w, and zeros up to a
// whole vector. `of_parts`, of as many parts as parts_of_product says: [parts] times y in float32;
// null for one part.
cudaError_t multiply_tiled(const MaskedWeight& w, bool transposed, const void* x, int64_t positions,
                           int64_t depth, int64_t parts, float* of_parts, void* y,
                           cudaStream_t stream);

// What gradients are sampled of, with zeros up to a whole vector in each row.
struct Sampled {
  const void* x;  // [G, T, x_columns]
  const void* g;  // [G, T, g_columns]
  int64_t positions, x_columns, g_columns;
};

// sums[i] = sum_t g[r, t] x[c, t] at every entry: sums [stored]; where w is dense, [G, O, K] with
// zeros off the mask. The values of w are not looked at. `of_parts`: [parts, count].
cudaError_t sample_tiled(const MaskedWeight& w, const Sampled& of, int64_t parts, int64_t count,
                         float* of_parts, void* sums, cudaStream_t stream);

// made[i] = sum_p of_parts[p, i], in the order of the parts.
cudaError_t add_parts(Storage storage, const float* of_parts, int64_t parts, int64_t count,
                      void* made, cudaStream_t stream);

}  // namespace pathprune::cuda
