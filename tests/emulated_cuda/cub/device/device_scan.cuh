// In place of CUB's, which is not under test.

#pragma once

#include <cuda_runtime.h>

namespace cub {

struct DeviceScan {
  static cudaError_t ExclusiveSum(void* workspace, size_t& bytes, const int64_t* values,
                                  int64_t* sums, int64_t count, cudaStream_t = nullptr) {
    if (workspace == nullptr) {
      bytes = 1;
      return cudaSuccess;
    }
    int64_t sum = 0;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t value = values[i];
      sums[i] = sum;
      sum += value;
    }
    return cudaSuccess;
  }
};

}  // namespace cub
