// The one place where kernels are launched.

#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace pathprune::cuda {

// No blocks, no launch. `blocks` is below 2^31: kernels loop over what is left.
template <typename... Parameters, typename... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), int64_t blocks, int threads, cudaStream_t stream,
                   const Arguments&... arguments) {
  if (blocks <= 0) return cudaSuccess;
  kernel<<<static_cast<unsigned>(blocks), static_cast<unsigned>(threads), 0, stream>>>(
      static_cast<Parameters>(arguments)...);
  return cudaGetLastError();
}

}  // namespace pathprune::cuda
