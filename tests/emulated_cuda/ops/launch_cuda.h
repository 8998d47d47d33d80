// In place of csrc/ops/launch_cuda.h: the one place where kernels are launched.

#pragma once

#include <cuda_runtime.h>

#include <tuple>

namespace pathprune::cuda {

template <typename... Parameters, typename... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), int64_t blocks, int threads, cudaStream_t,
                   const Arguments&... arguments) {
  struct Call {
    void (*kernel)(Parameters...);
    std::tuple<Parameters...> arguments;
  };
  if (blocks <= 0) return cudaSuccess;
  // Few, so that kernels have to loop: they do so on a GPU only over more than tests can wait for.
  constexpr int64_t kMostBlocks = 24;
  if (blocks > kMostBlocks) blocks = kMostBlocks;
  const Call call = {kernel, {static_cast<Parameters>(arguments)...}};
  const auto thread = [](const void* given) {
    const Call* own = static_cast<const Call*>(given);
    std::apply(own->kernel, own->arguments);
  };
  emulated::run(thread, &call, static_cast<unsigned>(blocks), static_cast<unsigned>(threads));
  return cudaSuccess;
}

}  // namespace pathprune::cuda
