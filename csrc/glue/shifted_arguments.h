// The arguments of shifted_matmul.

#pragma once

#include "glue/arguments.h"

namespace pathprune {

// w [rows, columns], shift [columns] and x [numbers], contiguous for as long as this lives; every
// read lies inside x.
struct ShiftedArguments {
  ShiftedArguments(const char* op, const Tensor& w, const Tensor& shift, const Tensor& x,
                   int64_t length);

  Tensor w, shift, x;
  int64_t rows, columns, length;
};

}  // namespace pathprune
