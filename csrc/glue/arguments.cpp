#include "glue/arguments.h"

#include <cmath>
#include <sstream>
#include <stdexcept>
#include <vector>

#include "ops/sweep.h"

namespace pathprune {
namespace {

const char* name_of(ScalarType type) {
  switch (type) {
    case ScalarType::Float:
      return "float32";
    case ScalarType::Double:
      return "float64";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Half:
      return "float16";
    case ScalarType::Short:
      return "int16";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Long:
      return "int64";
    case ScalarType::Bool:
      return "bool";
    default:
      return torch::headeronly::toString(type);
  }
}

template <typename Sizes>
std::string list_of(const Sizes& sizes) {
  std::ostringstream text;
  const char* separator = "[";
  for (const int64_t size : sizes) {
    text << separator << size;
    separator = ", ";
  }
  return sizes.size() == 0 ? "[]" : text.str() + "]";
}

std::string device_of(const Tensor& tensor) {
  if (tensor.is_cpu()) return "cpu";
  return (tensor.is_cuda() ? "cuda:" : "device ") + std::to_string(tensor.get_device_index());
}

bool same_device(const Tensor& a, const Tensor& b) {
  return a.is_cpu() == b.is_cpu() && a.is_cuda() == b.is_cuda() &&
         a.get_device_index() == b.get_device_index();
}

void check_dimensions(const char* op, const char* argument, const Tensor& tensor, int64_t count,
                      const char* wanted) {
  if (tensor.dim() != count) refuse(op, argument, wanted, describe(tensor));
}

OptionalTensor contiguous(const OptionalTensor& tensor) {
  if (!tensor) return std::nullopt;
  return torch::stable::contiguous(*tensor);
}

}  // namespace

void refuse(const char* op, const char* argument, const std::string& wanted,
            const std::string& got) {
  throw std::invalid_argument(std::string(op) + ": " + argument + ": wanted " + wanted + ", got " +
                              got);
}

std::string describe(const Tensor& tensor) {
  return std::string(name_of(tensor.scalar_type())) + " " + list_of(tensor.sizes()) + " on " +
         device_of(tensor);
}

void check_tensor(const char* op, const char* argument, const Tensor& tensor, ScalarType type,
                  std::initializer_list<int64_t> shape, const Tensor& device) {
  const auto sizes = tensor.sizes();
  if (tensor.scalar_type() == type && same_device(tensor, device) &&
      std::equal(shape.begin(), shape.end(), sizes.begin(), sizes.end())) {
    return;
  }
  refuse(op, argument,
         std::string(name_of(type)) + " " + list_of(shape) + " on " + device_of(device),
         describe(tensor));
}

void check_at_least(const char* op, const char* argument, int64_t value, int64_t least) {
  if (value < least) {
    refuse(op, argument, "a number >= " + std::to_string(least), std::to_string(value));
  }
}

void check_not_nan(const char* op, const char* argument, double value) {
  if (std::isnan(value)) refuse(op, argument, "a number or an infinity", "nan");
}

WeightMap check_map(const char* op, const char* argument, int64_t code) {
  if (code < 0 || code > 3) refuse(op, argument, "a WeightMap, 0 to 3", std::to_string(code));
  return static_cast<WeightMap>(code);
}

int64_t words_of(int64_t columns) { return (columns + kWordColumns - 1) / kWordColumns; }

Storage check_storage(const char* op, const char* argument, const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return Storage::kFloat32;
    case ScalarType::Double:
      return Storage::kFloat64;
    case ScalarType::BFloat16:
      return Storage::kBfloat16;
    case ScalarType::Half:
      return Storage::kFloat16;
    default:
      refuse(op, argument, "float32, float64, bfloat16 or float16", describe(tensor));
  }
}

WeightArguments::WeightArguments(const char* op, const Tensor& weight, const OptionalTensor& mask,
                                 const OptionalTensor& layout, const OptionalTensor& row_start,
                                 int64_t columns)
    : values_(weight) {
  view_.storage = check_storage(op, "weight", weight);
  check_at_least(op, "columns", columns, 0);
  view_.columns = columns;
  view_.words = words_of(columns);
  if (layout) {
    check_dimensions(op, "weight", weight, 1, "1 dimension with a layout");
    check_dimensions(op, "layout", *layout, 3, "3 dimensions [G, O, W]");
    if (!row_start) refuse(op, "row_start", "a tensor with a layout", "None");
    if (!mask) refuse(op, "mask", "a mask with a packed weight", "None");
  } else {
    check_dimensions(op, "weight", weight, 3, "3 dimensions [G, O, K]");
    if (weight.size(2) != columns) {
      refuse(op, "columns", "the weight's K = " + std::to_string(weight.size(2)),
             std::to_string(columns));
    }
    if (row_start) refuse(op, "row_start", "None without a layout", describe(*row_start));
  }
  view_.groups = (layout ? *layout : weight).size(0);
  view_.rows = (layout ? *layout : weight).size(1);
  const auto check_words = [&](const char* argument, const OptionalTensor& words) {
    if (!words) return;
    check_tensor(op, argument, *words, ScalarType::Short, {view_.groups, view_.rows, view_.words},
                 weight);
  };
  check_words("layout", layout);
  check_words("mask", mask);
  if (row_start) {
    check_tensor(op, "row_start", *row_start, ScalarType::Long, {view_.groups * view_.rows + 1},
                 weight);
  }
  values_ = torch::stable::contiguous(weight);
  mask_ = contiguous(mask);
  layout_ = contiguous(layout);
  row_start_ = contiguous(row_start);
  view_.values = values_.const_data_ptr();
  view_.mask = data_or_null<uint16_t>(mask_);
  view_.layout = data_or_null<uint16_t>(layout_);
  view_.row_start = data_or_null<int64_t>(row_start_);
  if (row_start_ && weight.is_cpu()) {
    const int64_t stored = view_.row_start[view_.groups * view_.rows];
    if (view_.row_start[0] != 0 || stored < 0 || stored + kWordColumns > weight.size(0)) {
      refuse(op, "weight",
             "the " + std::to_string(stored) + " values that row_start tells of and " +
                 std::to_string(kWordColumns) + " of padding",
             describe(weight));
    }
  }
}

uint16_t* check_written(const char* op, const Tensor& mask) {
  if (!mask.is_contiguous()) {
    refuse(op, "mask", "a contiguous tensor to write to", "strides " + list_of(mask.strides()));
  }
  return static_cast<uint16_t*>(mask.mutable_data_ptr());
}

Tensor check_flow(const char* op, const char* argument, const Tensor& flow,
                  const WeightArguments& weight, int64_t units) {
  check_dimensions(op, argument, flow, 3, "3 dimensions [G, T, units]");
  check_tensor(op, argument, flow, weight.accumulate(), {weight.view().groups, flow.size(1), units},
               weight.values());
  return torch::stable::contiguous(flow);
}

ScoreArguments::ScoreArguments(const char* op, const WeightArguments& weight,
                               const OptionalTensor& x_given, const OptionalTensor& g_given,
                               int64_t code, const char* x_name, const char* g_name)
    : s(check_map(op, "s", code)) {
  if (x_given.has_value() != g_given.has_value()) {
    refuse(op, g_name, std::string(x_name) + " and " + g_name + ", or neither",
           g_given ? describe(*g_given) : "None");
  }
  if (!x_given) return;
  x = check_flow(op, x_name, *x_given, weight, weight.view().columns);
  g = check_flow(op, g_name, *g_given, weight, weight.view().rows);
  if (x->size(1) != g->size(1)) {
    refuse(op, g_name, "T = " + std::to_string(x->size(1)) + ", as " + x_name, describe(*g));
  }
}

Tensor new_tensor(const Tensor& like, std::initializer_list<int64_t> shape, ScalarType type) {
  return torch::stable::new_empty(like, std::vector<int64_t>(shape), type);
}

}  // namespace pathprune
