// The sizes of a convolution of two axes, with one group.

#pragma once

#include <algorithm>
#include <cstdint>

#include "core/macros.h"

namespace pathprune {

// One axis of a convolution. Of every s-th row, a stride of s, the images have s phases; a kernel
// entry reads one of them, some rows before or behind the output's.
struct ThinAxis {
  int64_t size, kernel, stride, padding, dilation;

  int64_t span() const { return dilation * (kernel - 1); }  // from the first entry to the last
  int64_t out() const { return (size + 2 * padding - span() - 1) / stride + 1; }
  int64_t before() const { return ceil_divide(padding, stride); }  // rows of padding in a phase
  // What an entry reads first, from the padding on: which phase, and the row in it.
  int64_t phase(int64_t entry) const { return first(entry) % stride; }
  int64_t row(int64_t entry) const { return first(entry) / stride; }
  int64_t first(int64_t entry) const { return entry * dilation + before() * stride - padding; }
  int64_t reach() const { return row(kernel - 1); }
  // From an image to the next: the padding behind one is that before the next.
  int64_t period() const {
    return std::max(ceil_divide(size, stride) + before(),
                    out() + std::max<int64_t>(reach() - before(), 0));
  }
};

struct ThinShape {
  int64_t images, channels, rows;  // rows: of the weight, one for each filter
  ThinAxis y, x;

  int64_t kernel() const { return y.kernel * x.kernel; }
  int64_t plane() const { return y.out() * x.out(); }  // of outputs
};

}  // namespace pathprune
