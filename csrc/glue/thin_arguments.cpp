#include "glue/thin_arguments.h"

namespace pathprune {

void check_images(const char* op, const Tensor& x) {
  const auto type = x.scalar_type();
  if (x.dim() != 4 || (type != ScalarType::Float && type != ScalarType::Double)) {
    refuse(op, "x", "float32 or float64 [N, C, H, W]", describe(x));
  }
}

ThinShape check_thin(const char* op, const Tensor& x, int64_t rows, int64_t kernel_y,
                     int64_t kernel_x, const ThinGeometry& geometry) {
  check_at_least(op, "stride_y", geometry.stride_y, 1);
  check_at_least(op, "stride_x", geometry.stride_x, 1);
  check_at_least(op, "padding_y", geometry.padding_y, 0);
  check_at_least(op, "padding_x", geometry.padding_x, 0);
  check_at_least(op, "dilation_y", geometry.dilation_y, 1);
  check_at_least(op, "dilation_x", geometry.dilation_x, 1);
  const ThinShape s = {
      x.size(0),
      x.size(1),
      rows,
      {x.size(2), kernel_y, geometry.stride_y, geometry.padding_y, geometry.dilation_y},
      {x.size(3), kernel_x, geometry.stride_x, geometry.padding_x, geometry.dilation_x}};
  const auto fits = [](const ThinAxis& a) { return a.span() < a.size + 2 * a.padding; };
  if (!fits(s.y) || !fits(s.x)) refuse(op, "x", "images no smaller than the kernel", describe(x));
  return s;
}

void check_reads(const char* op, const Tensor& x, const ThinTiling& tiling) {
  if (tiling.x_plane > kMostThinNumbers) {
    refuse(op, "x", "less than 2^31 numbers in the rows that a kernel reads", describe(x));
  }
}

}  // namespace pathprune
