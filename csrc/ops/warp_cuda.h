// What the lanes of a warp do together, and how kernels are launched. For .cu files.

#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "ops/launch_cuda.h"
#include "ops/tile_cuda.h"
#include "ops/weights.h"

namespace pathprune::cuda {

inline constexpr uint32_t kAllLanes = 0xFFFFFFFFu;

// Every lane gets the sum, formed in the same order on every run.
template <typename T>
__device__ __forceinline__ T warp_sum(T value) {
  for (int apart = kLanes / 2; apart > 0; apart /= 2) {
    value += __shfl_xor_sync(kAllLanes, value, apart);
  }
  return value;
}

// The sum over the lanes before this one; `total` is that over all.
template <typename T>
__device__ __forceinline__ T warp_sum_before(T value, int lane, T* total) {
  T sum = value;
  for (int apart = 1; apart < kLanes; apart *= 2) {
    const T other = __shfl_up_sync(kAllLanes, sum, apart);
    if (lane >= apart) sum += other;
  }
  *total = __shfl_sync(kAllLanes, sum, kLanes - 1);
  return sum - value;
}

__device__ __forceinline__ void atomic_add(int64_t* total, int64_t value) {
  atomicAdd(reinterpret_cast<unsigned long long*>(total), static_cast<unsigned long long>(value));
}

__device__ __forceinline__ int lane_of_thread() { return static_cast<int>(threadIdx.x % kLanes); }
__device__ __forceinline__ int warp_of_block() { return static_cast<int>(threadIdx.x / kLanes); }
// Warps are numbered through the grid, for loops over what each warp takes alone.
__device__ __forceinline__ int64_t warp_of_grid() {
  return static_cast<int64_t>(blockIdx.x) * kWarps + warp_of_block();
}
__device__ __forceinline__ int64_t warps_of_grid() {
  return static_cast<int64_t>(gridDim.x) * kWarps;
}
__device__ __forceinline__ int64_t thread_of_grid() {
  return static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
}
__device__ __forceinline__ int64_t threads_of_grid() {
  return static_cast<int64_t>(gridDim.x) * blockDim.x;
}

// Blocks for loops in which each warp, or thread, takes one thing after another: enough to fill any
// GPU several times over, few enough that what a block does once costs nothing.
inline int64_t blocks_for(int64_t things, int per_block) {
  constexpr int64_t kBlocks = 8192;
  const int64_t blocks = ceil_divide(things, per_block);
  return blocks < kBlocks ? blocks : kBlocks;
}

// Blocks for loops in which a block takes `things` one after another only where a grid ends.
inline int64_t blocks_of_grid(int64_t things) {
  constexpr int64_t kBlocks = int64_t{1} << 30;
  return things < kBlocks ? things : kBlocks;
}

// Calls body.template operator()<W, packed>() for the type that the weights are stored as.
template <typename Body>
cudaError_t by_storage(Storage storage, bool packed, const Body& body) {
  const auto chosen = [&]<typename W>() {
    return packed ? body.template operator()<W, true>() : body.template operator()<W, false>();
  };
  switch (storage) {
    case Storage::kFloat32:
      return chosen.template operator()<float>();
    case Storage::kFloat64:
      return chosen.template operator()<double>();
    case Storage::kBfloat16:
      return chosen.template operator()<Bfloat16>();
    case Storage::kFloat16:
      return chosen.template operator()<Float16>();
  }
  return cudaErrorInvalidValue;
}

}  // namespace pathprune::cuda
