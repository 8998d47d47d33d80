// The exact k-th largest, by a radix search over order-preserving keys: 11 bits a pass from the
// top, three passes for 32 bits and six for 64. A pass counts the values by their next bits, among
// those that share the bits found so far, and one block picks the digit that the k-th lies in. What
// has been found stays on the device.
//
// Bytes: each value once per pass. Nothing is sorted or moved, and no number of ties matters.

#include "core/float_key.h"
#include "ops/kernels_cuda.h"
#include "ops/tile_cuda.h"
#include "ops/warp_cuda.h"

namespace pathprune::cuda {
namespace {

constexpr int kDigitBits = 11;
constexpr int kDigits = 1 << kDigitBits;

template <typename Key>
constexpr int kPasses = (8 * static_cast<int>(sizeof(Key)) + kDigitBits - 1) / kDigitBits;

template <typename Key>
struct Search {
  Key found;     // the bits above the digit of this pass
  int64_t left;  // which of the values that share them is looked for, from 1, the largest first
  unsigned long long counts[kPasses<Key>][kDigits];
};

template <typename Key>
__global__ void begin_search(Search<Key>* search, const int64_t k) {
  search->found = 0;
  search->left = k;
}

// The digit of pass p is bits [low, high) of the key.
template <typename Key>
PP_HD int high_bit(int pass) {
  return 8 * static_cast<int>(sizeof(Key)) - pass * kDigitBits;
}
template <typename Key>
PP_HD int low_bit(int pass) {
  return high_bit<Key>(pass) > kDigitBits ? high_bit<Key>(pass) - kDigitBits : 0;
}

template <typename W>
__global__ void __launch_bounds__(kThreads)
    count_digits(const W* values, const int64_t count, const int pass,
                 Search<FloatKey<Accumulate<W>>>* search) {
  using Key = FloatKey<Accumulate<W>>;
  __shared__ uint32_t counts[kDigits];  // of this block, so that few atomics leave it
  for (int digit = threadIdx.x; digit < kDigits; digit += kThreads) counts[digit] = 0;
  __syncthreads();
  const int high = high_bit<Key>(pass), low = low_bit<Key>(pass);
  const Key found = search->found;
  for (int64_t i = thread_of_grid(); i < count; i += threads_of_grid()) {
    const Key key = float_key(widen(values[i]));
    // Two shifts: all bits at once is no shift that the language has.
    const Key above = key >> (high - 1) >> 1;
    if (above == found) {
      const Key digit = (key >> low) & ((Key{1} << (high - low)) - 1);
      atomicAdd(&counts[static_cast<int>(digit)], 1u);
    }
  }
  __syncthreads();
  for (int digit = threadIdx.x; digit < kDigits; digit += kThreads) {
    const unsigned long long here = counts[digit];
    if (here) atomicAdd(&search->counts[pass][digit], here);
  }
}

// One block: from the largest digit down, the first whose values reach the one that is looked for.
// A thread sums a stretch of digits; the thread whose stretch it is looks closer.
template <typename Key>
__global__ void __launch_bounds__(kThreads) pick_digit(Search<Key>* search, const int pass) {
  constexpr int kStretch = kDigits / kThreads;
  __shared__ int64_t sums[kThreads];
  const int thread = static_cast<int>(threadIdx.x);
  const int largest = kDigits - 1 - thread * kStretch;
  const unsigned long long* const counts = search->counts[pass];
  int64_t mine = 0;
  for (int i = 0; i < kStretch; ++i) mine += static_cast<int64_t>(counts[largest - i]);
  sums[thread] = mine;
  const int64_t left = search->left;
  const Key found = search->found;
  __syncthreads();  // also: all have read the search before one writes it
  int64_t before = 0;
  for (int i = 0; i < thread; ++i) before += sums[i];
  if (left <= before || left > before + mine) return;
  int64_t rest = left - before;
  int digit = largest;
  while (rest > static_cast<int64_t>(counts[digit])) {
    rest -= static_cast<int64_t>(counts[digit]);
    --digit;
  }
  const int bits = high_bit<Key>(pass) - low_bit<Key>(pass);
  search->found = (found << bits) | static_cast<Key>(digit);
  search->left = rest;
}

__device__ __forceinline__ void narrow(float value, float* to) { *to = value; }
__device__ __forceinline__ void narrow(double value, double* to) { *to = value; }
// The value is one that was widened, so these are exact.
__device__ __forceinline__ void narrow(float value, Bfloat16* to) {
  to->bits = static_cast<uint16_t>(bit_cast<uint32_t>(value) >> 16);
}
__device__ __forceinline__ void narrow(float value, Float16* to) {
  const uint32_t bits = bit_cast<uint32_t>(value), rest = bits & 0x7FFFFFFFu;
  uint32_t half;
  if (rest >= 0x7F800000u) {
    half = rest == 0x7F800000u ? 0x7C00u : 0x7E00u;  // infinity, NaN
  } else if (rest >= 0x38800000u) {
    half = (rest - 0x38000000u) >> 13;  // 2^-14 and more: the exponent's offset is 112 less
  } else {
    half = static_cast<uint32_t>(magnitude(value) * 0x1p24f);  // a multiple of 2^-24
  }
  to->bits = static_cast<uint16_t>((bits >> 16 & 0x8000u) | half);
}

template <typename W>
__global__ void end_search(const Search<FloatKey<Accumulate<W>>>* search, W* result) {
  narrow(float_of_key<Accumulate<W>>(search->found), result);
}

template <typename W>
cudaError_t find(const W* values, int64_t count, int64_t k, void* workspace, W* result,
                 cudaStream_t stream) {
  using Key = FloatKey<Accumulate<W>>;
  auto* const search = static_cast<Search<Key>*>(workspace);
  cudaError_t error = cudaMemsetAsync(search, 0, sizeof(*search), stream);
  if (error != cudaSuccess) return error;
  error = launch(begin_search<Key>, 1, 1, stream, search, k);
  // A block's counts take as long to leave it as 2048 values to enter it.
  constexpr int kValuesOfBlock = 8 * kDigits;
  const int64_t blocks = blocks_for(count, kValuesOfBlock);
  for (int pass = 0; pass < kPasses<Key> && error == cudaSuccess; ++pass) {
    error = launch(count_digits<W>, blocks, kThreads, stream, values, count, pass, search);
    if (error != cudaSuccess) return error;
    error = launch(pick_digit<Key>, 1, kThreads, stream, search, pass);
  }
  if (error != cudaSuccess) return error;
  return launch(end_search<W>, 1, 1, stream, search, result);
}

}  // namespace

size_t kth_largest_bytes(Storage storage) {
  return storage == Storage::kFloat64 ? sizeof(Search<uint64_t>) : sizeof(Search<uint32_t>);
}

cudaError_t find_kth_largest(const void* values, Storage storage, int64_t count, int64_t k,
                             void* workspace, void* result, cudaStream_t stream) {
  return by_storage(storage, false, [&]<typename W, bool kPacked>() {
    return find<W>(static_cast<const W*>(values), count, k, workspace, static_cast<W*>(result),
                   stream);
  });
}

}  // namespace pathprune::cuda
