// In place of csrc/ops/mma_cuda.h, which says how fragments lie: each lane brings what it holds,
// and takes what is its own. Copies arrive only when they are waited for, so that a wait that lacks
// is seen.

#pragma once

#include <cuda_runtime.h>

#include <type_traits>
#include <vector>

#include "ops/weights.h"

namespace pathprune::cuda {

namespace emulated_mma {

struct Copy {
  void* to;
  unsigned char bytes[16];
};
inline std::vector<Copy> copies[emulated::kMostThreads];  // that a thread has not waited for

struct Row {
  uint16_t item[8];
};

inline const void* aligned(const void* place) {
  if (reinterpret_cast<uintptr_t>(place) % 16 != 0) emulated::fail("16 bytes that are not aligned");
  return place;
}

// Item c of row r of each of the four matrices.
inline uint16_t item(const emulated::Brought* brought, int matrix, int r, int c) {
  return emulated::from_lane<Row>(brought, 8 * matrix + r).item[c];
}

template <typename W>
float number(uint32_t pair, int which) {
  return widen(W{static_cast<uint16_t>(pair >> (16 * which))});
}

}  // namespace emulated_mma

inline void copy_without_waiting(void* to, const void* from, bool is_there) {
  emulated_mma::Copy copy{};
  copy.to = const_cast<void*>(emulated_mma::aligned(to));
  if (is_there) std::memcpy(copy.bytes, emulated_mma::aligned(from), sizeof(copy.bytes));
  emulated_mma::copies[threadIdx.x].push_back(copy);
}

inline void wait_for_copies() {
  auto& copies = emulated_mma::copies[threadIdx.x];
  for (const auto& copy : copies) std::memcpy(copy.to, copy.bytes, sizeof(copy.bytes));
  copies.clear();
}

inline const emulated::Brought* meet_with_row(const char* purpose, const void* row) {
  emulated_mma::Row brought;
  std::memcpy(&brought, emulated_mma::aligned(row), sizeof(brought));
  return emulated::meet(purpose, 0xFFFFFFFFu, brought);
}

inline void load_fragments(const void* row, uint32_t (&to)[4]) {
  const auto* brought = meet_with_row("fragments", row);
  const int g = emulated::lane() / 4, q = emulated::lane() % 4;
  for (int i = 0; i < 4; ++i) {
    to[i] = emulated_mma::item(brought, i, g, 2 * q) |
            uint32_t{emulated_mma::item(brought, i, g, 2 * q + 1)} << 16;
  }
}

inline void load_transposed_fragments(const void* row, uint32_t (&to)[4]) {
  const auto* brought = meet_with_row("transposed fragments", row);
  const int g = emulated::lane() / 4, q = emulated::lane() % 4;
  for (int i = 0; i < 4; ++i) {
    to[i] = emulated_mma::item(brought, i, 2 * q, g) |
            uint32_t{emulated_mma::item(brought, i, 2 * q + 1, g)} << 16;
  }
}

template <typename W>
void multiply_fragments(const uint32_t (&a)[4], uint32_t b0, uint32_t b1, float (&sums)[4]) {
  struct Held {
    uint32_t a[4], b[2];
  };
  const auto* brought =
      emulated::meet("product", 0xFFFFFFFFu, Held{{a[0], a[1], a[2], a[3]}, {b0, b1}});
  const int g = emulated::lane() / 4, q = emulated::lane() % 4;
  for (int k = 0; k < 16; ++k) {
    const int holder = k % 8 / 2, half = k / 8;
    const Held of_rows = emulated::from_lane<Held>(brought, 4 * g + holder);
    for (int column = 0; column < 2; ++column) {
      const Held of_column = emulated::from_lane<Held>(brought, 4 * (2 * q + column) + holder);
      const float b = emulated_mma::number<W>(of_column.b[half], k % 2);
      for (int bottom = 0; bottom < 2; ++bottom) {
        sums[2 * bottom + column] +=
            emulated_mma::number<W>(of_rows.a[2 * half + bottom], k % 2) * b;
      }
    }
  }
}

template <typename W>
W rounded(float value) {
  if constexpr (sizeof(W) == sizeof(float)) {
    return value;
  } else if constexpr (std::is_same_v<W, Bfloat16>) {
    const uint32_t bits = bit_cast<uint32_t>(value);
    if (value != value) return {0x7FFF};
    return {static_cast<uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16)};
  } else {
    return {bit_cast<uint16_t>(static_cast<_Float16>(value))};
  }
}

}  // namespace pathprune::cuda
