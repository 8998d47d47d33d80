// What all CUDA ops need of torch: the device of a tensor, its current stream, errors.

#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include <optional>
#include <stdexcept>
#include <string>

#include "glue/arguments.h"

namespace pathprune::cuda {

inline void check(const char* op, cudaError_t error) {
  if (error == cudaSuccess) return;
  throw std::runtime_error(std::string(op) + ": CUDA: " + cudaGetErrorString(error));
}

// The device of a tensor made the current one, and its current stream, for as long as this lives.
class OnDevice {
 public:
  // A tensor on the CPU, which has no index, gets here beside another on CUDA: the checks of the
  // arguments, which are still to come, refuse the two.
  explicit OnDevice(const Tensor& tensor) {
    const auto index = tensor.get_device_index();
    if (index < 0) return;
    guard_.emplace(index);
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index, &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }

  cudaStream_t stream() const { return stream_; }

 private:
  std::optional<torch::stable::accelerator::DeviceGuard> guard_;
  cudaStream_t stream_ = nullptr;
};

}  // namespace pathprune::cuda
