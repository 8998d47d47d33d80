// The arguments that say where a sparse weight has its entries.

#pragma once

#include "glue/arguments.h"
#include "ops/sparse.h"

namespace pathprune {

// The tensors of a pattern and of its transpose, contiguous for as long as this lives.
// python/pathprune/sparse_ops.py says what each one is.
class PatternArguments {
 public:
  PatternArguments(const char* op, const Tensor& layout, const Tensor& row_start,
                   const Tensor& index, const OptionalTensor& layout_t,
                   const OptionalTensor& row_start_t, const OptionalTensor& index_t,
                   const OptionalTensor& order, int64_t columns);

  const Pattern& view() const { return view_; }
  // Refuses where the transpose was not given.
  const Pattern& transposed(const char* op) const;
  const Tensor& layout() const { return layout_; }
  int64_t stored() const { return index_.size(0); }

  // Refuses a flow [groups, T, units] that is not in A; any strides will do.
  void check_flow(const char* op, const char* argument, const Tensor& flow, ScalarType type,
                  int64_t units) const;

  // Refuses values that are not one for each entry, or more.
  void check_values(const char* op, const Tensor& values) const;

 private:
  Tensor layout_, row_start_, index_;
  OptionalTensor layout_t_, row_start_t_, index_t_, order_;
  Pattern view_, transposed_;
};

}  // namespace pathprune
