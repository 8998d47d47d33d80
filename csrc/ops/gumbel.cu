// Gumbel keys of scores. Bytes: the score in, 8 out; about 200 operations a score, most of them for
// three logarithms in float64, so on GPUs with little float64 this is bound by arithmetic.

#include "ops/gumbel.h"
#include "ops/kernels_cuda.h"
#include "ops/tile_cuda.h"
#include "ops/warp_cuda.h"

namespace pathprune::cuda {
namespace {

template <typename W>
__global__ void __launch_bounds__(kThreads)
    fill_keys(const W* scores, const int64_t count, const GumbelKeys key_of, double* keys,
              double* refused) {
  for (int64_t i = thread_of_grid(); i < count; i += threads_of_grid()) {
    const double score = static_cast<double>(widen(scores[i]));
    if (!(score >= 0)) *refused = score;  // of several, any
    keys[i] = key_of(score, i);
  }
}

}  // namespace

cudaError_t fill_gumbel_keys(const void* scores, Storage storage, int64_t count,
                             const GumbelKeys& key_of, double* keys, double* refused,
                             cudaStream_t stream) {
  const cudaError_t error = cudaMemsetAsync(refused, 0, sizeof(*refused), stream);
  if (error != cudaSuccess) return error;
  return by_storage(storage, false, [&]<typename W, bool kPacked>() {
    return launch(fill_keys<W>, blocks_for(count, kThreads), kThreads, stream,
                  static_cast<const W*>(scores), count, key_of, keys, refused);
  });
}

}  // namespace pathprune::cuda
