// The instructions that products in tiles are made of, each under a name: copies into shared memory
// that do not wait, fragments read from it, and products of fragments on the tensor cores. For .cu
// files; sm_80 has them all.
//
// A fragment is a small matrix of 16-bit numbers held by a warp, two to a register. With g = lane /
// 4 and q = lane % 4:
//   8 x 8:        the register holds row g, columns 2q and 2q + 1.
//   a, 16 x 16:   registers 0 to 3 are the 8 x 8 parts (top, left), (bottom, left), (top, right)
//   and
//                 (bottom, right).
//   b, 16 x 8:    held by its transpose [8, 16]: registers 0 and 1 are its left and right half.
//   sums, 16 x 8: float32; 0 and 1 are row g, columns 2q and 2q + 1; 2 and 3 row g + 8.

#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "ops/weights.h"

namespace pathprune::cuda {

__device__ __forceinline__ uint32_t shared_address(const void* place) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(place));
}

// Copies 16 bytes to shared memory, or writes zeros where there is nothing to copy; both places
// begin at multiples of 16 bytes.
__device__ __forceinline__ void copy_without_waiting(void* to, const void* from, bool is_there) {
  const int bytes = is_there ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from),
               "r"(bytes)
               : "memory");
}

// Waits for all copies of this thread; others see them after the next barrier.
__device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_all;" ::: "memory");
}

// Four 8 x 8 matrices: lane l names row l % 8 of matrix l / 8, of which 16 bytes lie side by side.
__device__ __forceinline__ void load_fragments(const void* row, uint32_t (&to)[4]) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(shared_address(row))
               : "memory");
}
// The same, of the transpose of each.
__device__ __forceinline__ void load_transposed_fragments(const void* row, uint32_t (&to)[4]) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(shared_address(row))
               : "memory");
}

// sums += a b, products and sums in float32.
template <typename W>
__device__ __forceinline__ void multiply_fragments(const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                                                   float (&sums)[4]) {
#define PP_MMA(type)                                                        \
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." type "." type       \
               ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "        \
               "{%0, %1, %2, %3};"                                          \
               : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3]) \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1))
  static_assert(sizeof(W) == 2);
  if constexpr (std::is_same_v<W, Bfloat16>) {
    PP_MMA("bf16");
  } else {
    PP_MMA("f16");
  }
#undef PP_MMA
}

// The nearest number that W has, ties to even.
template <typename W>
__device__ __forceinline__ W rounded(float value) {
  if constexpr (sizeof(W) == sizeof(float)) {
    return value;
  } else {
    W made;
    if constexpr (std::is_same_v<W, Bfloat16>) {
      asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(made.bits) : "f"(value));
    } else {
      asm("cvt.rn.f16.f32 %0, %1;" : "=h"(made.bits) : "f"(value));
    }
    return made;
  }
}

}  // namespace pathprune::cuda
