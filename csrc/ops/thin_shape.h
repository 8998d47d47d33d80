// The sizes of a convolution of two axes, with one group.

#pragma once

#include <cstdint>

namespace pathprune {

// One axis of a convolution.
struct ThinAxis {
  int64_t size, kernel, stride, padding, dilation;

  int64_t span() const { return dilation * (kernel - 1); }  // from the first entry to the last
  int64_t out() const { return (size + 2 * padding - span() - 1) / stride + 1; }
};

struct ThinShape {
  int64_t images, channels, rows;  // rows: of the weight, one for each filter
  ThinAxis y, x;

  int64_t kernel() const { return y.kernel * x.kernel; }
  int64_t plane() const { return y.out() * x.out(); }  // of outputs
};

}  // namespace pathprune
