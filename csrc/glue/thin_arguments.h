// The arguments of the ops on convolutions by weights that are mostly zeros.

#pragma once

#include "glue/arguments.h"
#include "ops/thin_shape.h"
#include "ops/thin_tiling.h"

namespace pathprune {

// Stride, padding and dilation of height and width.
struct ThinGeometry {
  int64_t stride_y, stride_x, padding_y, padding_x, dilation_y, dilation_x;
};

// Refuses images that are not [N, C, H, W] in float32 or float64.
void check_images(const char* op, const Tensor& x);

// The sizes of a convolution of x by a weight [rows, C, kernel_y, kernel_x]; refuses those that
// have no outputs.
ThinShape check_thin(const char* op, const Tensor& x, int64_t rows, int64_t kernel_y,
                     int64_t kernel_x, const ThinGeometry& geometry);

// Refuses images of which a kernel would read more than 32-bit shifts reach.
void check_reads(const char* op, const Tensor& x, const ThinTiling& tiling);

}  // namespace pathprune
