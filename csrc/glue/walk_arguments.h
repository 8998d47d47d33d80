// The arguments of the walk ops: checked once, here, and handed on as plain pointers.

#pragma once

#include <cstdint>

#include "glue/arguments.h"
#include "ops/walk.h"

namespace pathprune {

class WalkStepArguments {
 public:
  WalkStepArguments(const Tensor& weight, const Tensor& units, const Tensor& walks,
                    const OptionalTensor& mass, const OptionalTensor& gain,
                    const OptionalTensor& valid, int64_t power, bool to_rows, int64_t seed,
                    int64_t step, const char* op = "walk_step");

  const char* op() const { return op_; }
  const WalkMatrix& matrix() const { return matrix_; }
  const WalkRule& rule() const { return rule_; }
  const int64_t* units() const { return static_cast<const int64_t*>(units_.const_data_ptr()); }
  const int64_t* walks() const { return static_cast<const int64_t*>(walks_.const_data_ptr()); }
  // Refuses a unit that the matrix has not. On the host only.
  void check_units(const int64_t* units, int64_t count) const;
  [[noreturn]] void refuse_unit(int64_t unit) const;

 private:
  const char* op_;
  Tensor weight_, units_, walks_;
  OptionalTensor mass_, gain_, valid_;
  WalkMatrix matrix_;
  WalkRule rule_;
};

// What a step with positions takes besides.
class WalkFieldArguments {
 public:
  WalkFieldArguments(const WalkStepArguments& step, const Tensor& positions, const Tensor& flow,
                     const Tensor& leads_to);

  WalkField field(int64_t* next_position) const;
  // Refuses positions that there are not. On the host only.
  void check_positions() const;
  [[noreturn]] void refuse_position(int64_t position) const;
  [[noreturn]] void refuse_lead(int64_t position) const;
  int64_t places() const { return leads_to_.size(0); }

 private:
  const char* op_;
  Tensor positions_, flow_, leads_to_;
};

class WalkChooseArguments {
 public:
  WalkChooseArguments(const Tensor& cdf, const Tensor& row_start, const Tensor& rows,
                      const Tensor& walks, int64_t word);

  const ChoiceTable& table() const { return table_; }
  int64_t table_rows() const { return row_start_.size(0) - 1; }
  const int64_t* rows() const { return static_cast<const int64_t*>(rows_.const_data_ptr()); }
  const int64_t* walks() const { return static_cast<const int64_t*>(walks_.const_data_ptr()); }
  // Refuses row starts that descend or leave the table, and rows that it has not. On the host only.
  void check_rows() const;
  [[noreturn]] void refuse_start(int64_t next_start) const;
  void check_end(int64_t last_start) const;
  [[noreturn]] void refuse_row(int64_t row) const;

 private:
  Tensor cdf_, row_start_, rows_, walks_;
  ChoiceTable table_;
};

class WalkMarkArguments {
 public:
  WalkMarkArguments(const Tensor& bits, const Tensor& edges, int64_t target);

  // With the strides of the tensor that was given.
  const int64_t* edges() const { return static_cast<const int64_t*>(edges_.const_data_ptr()); }
  int64_t places() const { return places_; }
  // Refuses a place that the bits have not. On the host only.
  void check_edges() const;
  [[noreturn]] void refuse_edge(int64_t edge) const;

 private:
  Tensor edges_;
  int64_t places_;
};

}  // namespace pathprune
