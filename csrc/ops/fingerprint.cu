// Fingerprints of memory.
//
// Bytes: each once, a word a thread; a warp reads 256 adjacent bytes.

#include "core/fingerprint.h"

#include "ops/kernels_cuda.h"
#include "ops/tile_cuda.h"
#include "ops/warp_cuda.h"

namespace pathprune::cuda {
namespace {

__global__ void __launch_bounds__(kThreads)
    add_words(const uint8_t* bytes, const int64_t size, const bool aligned, int64_t* sum) {
  const int64_t words = ceil_divide(size, 8);
  uint64_t mine = 0;
  for (int64_t i = thread_of_grid(); i < words; i += threads_of_grid()) {
    const int64_t left = size - 8 * i;
    const uint64_t word = aligned && left >= 8 ? reinterpret_cast<const uint64_t*>(bytes)[i]
                                               : word_of_bytes(bytes + 8 * i, left < 8 ? left : 8);
    mine += fingerprint_of_word(word, i);
  }
  const auto total = static_cast<int64_t>(warp_sum(mine));
  if (lane_of_thread() == 0 && total != 0) atomic_add(sum, total);
}

}  // namespace

cudaError_t add_fingerprint(const uint8_t* bytes, int64_t size, int64_t* sum, cudaStream_t stream) {
  const cudaError_t error = cudaMemsetAsync(sum, 0, sizeof(int64_t), stream);
  if (error != cudaSuccess || size == 0) return error;
  const bool aligned = reinterpret_cast<uintptr_t>(bytes) % 8 == 0;
  return launch(add_words, blocks_for(ceil_divide(size, 8), kThreads), kThreads, stream, bytes,
                size, aligned, sum);
}

}  // namespace pathprune::cuda
