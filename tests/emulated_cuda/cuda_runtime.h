// CUDA on the host, as much of it as csrc/ops/*.cu use: to run the kernels where there is no GPU.
//
// Every thread of a block is a fiber, and blocks run one after another. What warps and blocks do
// together checks that all their threads do the same together, so a barrier or a shuffle that some
// do not reach, or that they reach at different places, ends the program and does not pass unseen.
// Between such meetings threads run in turns of any order, which shows many races, not all: the
// memory model of a GPU is weaker than this one.

#pragma once

#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __shared__ static  // one block at a time

// ---- the runtime --------------------------------------------------------------------------------

using cudaError_t = int;
using cudaStream_t = void*;
inline constexpr cudaError_t cudaSuccess = 0, cudaErrorInvalidValue = 1;
enum cudaMemcpyKind { cudaMemcpyHostToDevice, cudaMemcpyDeviceToHost };

inline cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t) {
  std::memset(to, value, bytes);
  return cudaSuccess;
}
inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind,
                                   cudaStream_t) {
  std::memcpy(to, from, bytes);
  return cudaSuccess;
}
inline cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return "an error"; }

// ---- the machine --------------------------------------------------------------------------------

namespace emulated {

inline constexpr int kLanes = 32, kMostThreads = 1024;

struct Size {
  unsigned x;
};

// What a lane brings to a meeting.
struct Brought {
  uint64_t words[3];
};

// Where the lanes of a warp meet. What they brought is kept for two meetings: a lane may be on its
// way to the next one while others still read.
struct Meeting {
  const char* purpose;
  Brought brought[kLanes];
  Brought kept[2][kLanes];
  int arrived;
  unsigned number;
};

struct Machine {
  Size thread, block, threads, blocks;
  Meeting meetings[kMostThreads / kLanes];
  int at_barrier;
  unsigned barrier;
  uint64_t progress;  // changes whenever a thread that waits may go on
};
extern Machine machine;

[[noreturn]] void fail(const char* what);
void let_others_run();
void run(void (*kernel)(const void*), const void* arguments, unsigned blocks, unsigned threads);

inline int lane() { return static_cast<int>(machine.thread.x % kLanes); }

// What all the lanes of this warp brought.
template <typename T>
const Brought* meet(const char* purpose, unsigned lanes, T value) {
  static_assert(sizeof(T) <= sizeof(Brought));
  if (lanes != 0xFFFFFFFFu) fail("a meeting of some lanes");
  Meeting& meeting = machine.meetings[machine.thread.x / kLanes];
  if (meeting.arrived == 0) meeting.purpose = purpose;
  if (std::strcmp(meeting.purpose, purpose) != 0)
    fail("lanes of a warp meet for different purposes");
  std::memcpy(&meeting.brought[lane()], &value, sizeof(T));
  const unsigned number = meeting.number;
  if (++meeting.arrived == kLanes) {
    std::memcpy(meeting.kept[number % 2], meeting.brought, sizeof(meeting.brought));
    meeting.arrived = 0;
    ++meeting.number;
    ++machine.progress;
  }
  while (meeting.number == number) let_others_run();
  return meeting.kept[number % 2];
}

template <typename T>
T from_lane(const Brought* brought, int from) {
  if (from < 0 || from >= kLanes) fail("a shuffle from no lane");
  T value;
  std::memcpy(&value, &brought[from], sizeof(T));
  return value;
}

}  // namespace emulated

#define threadIdx (emulated::machine.thread)
#define blockIdx (emulated::machine.block)
#define blockDim (emulated::machine.threads)
#define gridDim (emulated::machine.blocks)

// ---- what threads do together -------------------------------------------------------------------

template <typename T>
T __shfl_sync(unsigned lanes, T value, int from) {
  return emulated::from_lane<T>(emulated::meet("shuffle", lanes, value), from);
}
template <typename T>
T __shfl_xor_sync(unsigned lanes, T value, int apart) {
  const emulated::Brought* brought = emulated::meet("shuffle by xor", lanes, value);
  return emulated::from_lane<T>(brought, emulated::lane() ^ apart);
}
template <typename T>
T __shfl_up_sync(unsigned lanes, T value, int apart) {
  const emulated::Brought* brought = emulated::meet("shuffle up", lanes, value);
  const int from = emulated::lane() - apart;
  return emulated::from_lane<T>(brought, from < 0 ? emulated::lane() : from);
}
inline unsigned __ballot_sync(unsigned lanes, int vote) {
  const emulated::Brought* brought = emulated::meet("ballot", lanes, vote);
  unsigned votes = 0;
  for (int i = 0; i < emulated::kLanes; ++i) {
    votes |= static_cast<unsigned>(emulated::from_lane<int>(brought, i) != 0) << i;
  }
  return votes;
}
inline int __any_sync(unsigned lanes, int vote) { return __ballot_sync(lanes, vote) != 0; }
template <typename T>
unsigned __match_any_sync(unsigned lanes, T value) {
  const emulated::Brought* brought = emulated::meet("match", lanes, value);
  unsigned same = 0;
  for (int i = 0; i < emulated::kLanes; ++i) {
    same |= static_cast<unsigned>(emulated::from_lane<T>(brought, i) == value) << i;
  }
  return same;
}
inline void __syncwarp() { emulated::meet("wait for the warp", 0xFFFFFFFFu, 0); }

inline void __syncthreads() {
  emulated::Machine& machine = emulated::machine;
  const unsigned barrier = machine.barrier;
  if (++machine.at_barrier == static_cast<int>(machine.threads.x)) {
    machine.at_barrier = 0;
    ++machine.barrier;
    ++machine.progress;
  }
  while (machine.barrier == barrier) emulated::let_others_run();
}

// ---- atomics and bits ---------------------------------------------------------------------------

template <typename T>
T atomicAdd(T* place, T value) {
  const T old = *place;
  *place = old + value;
  return old;
}
template <typename T>
T atomicMin(T* place, T value) {
  const T old = *place;
  *place = value < old ? value : old;
  return old;
}
template <typename T>
T atomicMax(T* place, T value) {
  const T old = *place;
  *place = value > old ? value : old;
  return old;
}
template <typename T>
T atomicOr(T* place, T value) {
  const T old = *place;
  *place = old | value;
  return old;
}
template <typename T>
T atomicAnd(T* place, T value) {
  const T old = *place;
  *place = old & value;
  return old;
}
inline int __popc(unsigned bits) { return std::popcount(bits); }
inline int __clz(int bits) { return std::countl_zero(static_cast<unsigned>(bits)); }
inline unsigned __brev(unsigned bits) {
  unsigned reversed = 0;
  for (int i = 0; i < 32; ++i) reversed |= (bits >> i & 1u) << (31 - i);
  return reversed;
}
inline int __ffs(int bits) { return __builtin_ffs(bits); }
