// The arguments of ops: checked once, here, and handed on as plain pointers.

#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <initializer_list>
#include <optional>
#include <string>

#include "core/weight_map.h"
#include "ops/weights.h"

namespace pathprune {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

template <typename T>
const T* data_or_null(const OptionalTensor& tensor) {
  return tensor ? static_cast<const T*>(tensor->const_data_ptr()) : nullptr;
}

// Raises "op: argument: wanted ..., got ...".
[[noreturn]] void refuse(const char* op, const char* argument, const std::string& wanted,
                         const std::string& got);

// "float32 [2, 3] on cpu"
std::string describe(const Tensor& tensor);

// Refuses a tensor that is not of this type, shape and device.
void check_tensor(const char* op, const char* argument, const Tensor& tensor, ScalarType type,
                  std::initializer_list<int64_t> shape, const Tensor& device);
void check_at_least(const char* op, const char* argument, int64_t value, int64_t least);
void check_not_nan(const char* op, const char* argument, double value);
WeightMap check_map(const char* op, const char* argument, int64_t code);
int64_t words_of(int64_t columns);

// The storage of a float tensor; refuses all others.
Storage check_storage(const char* op, const char* argument, const Tensor& tensor);

// A weight and its mask, contiguous for as long as this lives.
class WeightArguments {
 public:
  WeightArguments(const char* op, const Tensor& weight, const OptionalTensor& mask,
                  const OptionalTensor& layout, const OptionalTensor& row_start, int64_t columns);

  const Weights& view() const { return view_; }
  const Tensor& values() const { return values_; }
  bool is_double() const { return view_.storage == Storage::kFloat64; }
  // A, the type of flows and scores.
  ScalarType accumulate() const { return is_double() ? ScalarType::Double : ScalarType::Float; }

 private:
  Tensor values_;
  OptionalTensor mask_, layout_, row_start_;
  Weights view_;
};

// A mask that an op writes to.
uint16_t* check_written(const char* op, const Tensor& mask);

// A flow [groups, T, units] in A, made contiguous.
Tensor check_flow(const char* op, const char* argument, const Tensor& flow,
                  const WeightArguments& weight, int64_t units);

// x [groups, T, columns] and g [groups, T, rows], or neither.
struct ScoreArguments {
  ScoreArguments(const char* op, const WeightArguments& weight, const OptionalTensor& x,
                 const OptionalTensor& g, int64_t s, const char* x_name = "x",
                 const char* g_name = "g");

  WeightMap s;
  OptionalTensor x, g;
};

// An uninitialised tensor on the device of `like`.
Tensor new_tensor(const Tensor& like, std::initializer_list<int64_t> shape, ScalarType type);

}  // namespace pathprune
