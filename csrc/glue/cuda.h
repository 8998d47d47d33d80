// What the CUDA ops share: errors, the device and stream of a tensor, what is read back.

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

template <typename T>
T* data_of(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

inline Tensor new_integers(const Tensor& like, int64_t count) {
  return new_tensor(like, {count}, ScalarType::Long);
}

inline Tensor new_bytes(const Tensor& like, size_t count) {
  return new_tensor(like, {static_cast<int64_t>(count)}, ScalarType::Byte);
}

// Waits for the stream.
template <typename T>
T read_one(const char* op, const T* place, cudaStream_t stream) {
  T value;
  check(op, cudaMemcpyAsync(&value, place, sizeof(T), cudaMemcpyDeviceToHost, stream));
  check(op, cudaStreamSynchronize(stream));
  return value;
}

}  // namespace pathprune::cuda
