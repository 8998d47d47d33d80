#include "glue/walk_arguments.h"

#include <algorithm>

#include <limits>

namespace pathprune {
namespace {

Tensor check_list(const char* op, const char* argument, const Tensor& tensor, int64_t count,
                  const Tensor& device) {
  check_tensor(op, argument, tensor, ScalarType::Long, {count}, device);
  return torch::stable::contiguous(tensor);
}

OptionalTensor check_optional(const char* op, const char* argument, const OptionalTensor& tensor,
                              ScalarType type, int64_t count, const Tensor& device) {
  if (!tensor) return tensor;
  check_tensor(op, argument, *tensor, type, {count}, device);
  return torch::stable::contiguous(*tensor);
}

}  // namespace

WalkStepArguments::WalkStepArguments(const Tensor& weight, const Tensor& units, const Tensor& walks,
                                     const OptionalTensor& mass, const OptionalTensor& gain,
                                     const OptionalTensor& valid, int64_t power, bool to_rows,
                                     int64_t seed, int64_t step, const char* op)
    : op_(op),
      weight_(weight),
      units_(units),
      walks_(walks),
      mass_(mass),
      gain_(gain),
      valid_(valid) {
  const Storage storage = check_storage(op, "weight", weight);
  if (weight.dim() != 4) refuse(op, "weight", "4 dimensions [G, R, C, E]", describe(weight));
  weight_ = torch::stable::contiguous(weight);
  if (units.dim() != 1) refuse(op, "units", "1 dimension", describe(units));
  units_ = check_list(op, "units", units, units.size(0), weight);
  walks_ = check_list(op, "walks", walks, units.size(0), weight);
  if (units.numel() > std::numeric_limits<uint32_t>::max()) {
    refuse(op, "units", "at most 2^32 - 1 walkers", std::to_string(units.numel()));
  }
  if (power < -1 || power > 2) refuse(op, "power", "-1, 0, 1 or 2", std::to_string(power));
  check_at_least(op, "step", step, 0);
  matrix_ = {weight_.const_data_ptr(), storage,        weight.size(0), weight.size(1),
             weight.size(2),           weight.size(3), to_rows};
  gain_ = check_optional(op, "gain", gain, ScalarType::Double,
                         matrix_.groups * matrix_.candidates(), weight);
  valid_ = check_optional(op, "valid", valid, ScalarType::Bool, matrix_.entries, weight);
  if (mass) {
    check_tensor(op, "mass", *mass, ScalarType::Double,
                 {matrix_.groups, matrix_.rows, matrix_.columns}, weight);
    mass_ = torch::stable::contiguous(*mass);
  }
  rule_ = {static_cast<int>(power),       data_or_null<double>(mass_), data_or_null<double>(gain_),
           data_or_null<uint8_t>(valid_), static_cast<uint64_t>(seed), step};
}

void WalkStepArguments::check_units(const int64_t* units, int64_t count) const {
  for (int64_t i = 0; i < count; ++i) {
    if (units[i] < 0 || units[i] >= matrix_.units()) refuse_unit(units[i]);
  }
}

void WalkStepArguments::refuse_unit(int64_t unit) const {
  refuse(op_, "units", "0 to " + std::to_string(matrix_.units() - 1), std::to_string(unit));
}

WalkFieldArguments::WalkFieldArguments(const WalkStepArguments& step, const Tensor& positions,
                                       const Tensor& flow, const Tensor& leads_to)
    : op_(step.op()), positions_(positions), flow_(flow), leads_to_(leads_to) {
  const WalkMatrix& m = step.matrix();
  if (positions.dim() != 1) refuse(op_, "positions", "1 dimension", describe(positions));
  positions_ = check_list(op_, "positions", positions, positions.size(0), positions);
  if (flow.dim() != 2) refuse(op_, "flow", "2 dimensions [units, positions]", describe(flow));
  const int64_t targets = m.groups * m.candidates();
  check_tensor(op_, "flow", flow, ScalarType::Double, {targets, flow.size(1)}, positions);
  flow_ = torch::stable::contiguous(flow);
  if (leads_to.dim() != 2) refuse(op_, "leads_to", "2 dimensions", describe(leads_to));
  check_tensor(op_, "leads_to", leads_to, ScalarType::Long, {leads_to.size(0), m.entries},
               positions);
  leads_to_ = torch::stable::contiguous(leads_to);
}

WalkField WalkFieldArguments::field(int64_t* next_position) const {
  return {static_cast<const double*>(flow_.const_data_ptr()), flow_.size(1),
          static_cast<const int64_t*>(leads_to_.const_data_ptr()),
          static_cast<const int64_t*>(positions_.const_data_ptr()), next_position};
}

void WalkFieldArguments::check_positions() const {
  const WalkField field = this->field(nullptr);
  for (int64_t i = 0; i < positions_.numel(); ++i) {
    if (field.at[i] < 0 || field.at[i] >= places()) refuse_position(field.at[i]);
  }
  for (int64_t i = 0; i < leads_to_.numel(); ++i) {
    if (field.position[i] >= field.positions) refuse_lead(field.position[i]);
  }
}

void WalkFieldArguments::refuse_position(int64_t position) const {
  refuse(op_, "positions", "0 to " + std::to_string(places() - 1), std::to_string(position));
}

void WalkFieldArguments::refuse_lead(int64_t position) const {
  refuse(op_, "leads_to", "positions below " + std::to_string(flow_.size(1)),
         std::to_string(position));
}

WalkChooseArguments::WalkChooseArguments(const Tensor& cdf, const Tensor& row_start,
                                         const Tensor& rows, const Tensor& walks, int64_t word)
    : cdf_(cdf), row_start_(row_start), rows_(rows), walks_(walks) {
  const char* op = "walk_choose";
  if (cdf.dim() != 1) refuse(op, "cdf", "1 dimension", describe(cdf));
  cdf_ = check_list(op, "cdf", cdf, cdf.size(0), cdf);
  if (row_start.dim() != 1 || row_start.size(0) < 1) {
    refuse(op, "row_start", "1 dimension of at least 1", describe(row_start));
  }
  row_start_ = check_list(op, "row_start", row_start, row_start.size(0), cdf);
  if (rows.dim() != 1) refuse(op, "rows", "1 dimension", describe(rows));
  rows_ = check_list(op, "rows", rows, rows.size(0), cdf);
  walks_ = check_list(op, "walks", walks, rows.size(0), cdf);
  if (word < 0 || word > 3) refuse(op, "word", "0 to 3", std::to_string(word));
  table_ = {static_cast<const uint64_t*>(cdf_.const_data_ptr()),
            static_cast<const int64_t*>(row_start_.const_data_ptr())};
}

void WalkChooseArguments::check_rows() const {
  for (int64_t i = 0; i < table_rows(); ++i) {
    if (!table_.is_row(i)) refuse_start(table_.row_start[i + 1]);
  }
  check_end(table_.row_start[table_rows()]);
  for (int64_t i = 0; i < rows_.size(0); ++i) {
    if (rows()[i] < 0 || rows()[i] >= table_rows()) refuse_row(rows()[i]);
  }
}

void WalkChooseArguments::refuse_start(int64_t next_start) const {
  refuse("walk_choose", "row_start", "numbers that do not descend", std::to_string(next_start));
}

void WalkChooseArguments::check_end(int64_t last_start) const {
  if (last_start <= cdf_.size(0)) return;
  refuse("walk_choose", "row_start", "at most " + std::to_string(cdf_.size(0)) + " entries",
         std::to_string(last_start));
}

void WalkChooseArguments::refuse_row(int64_t row) const {
  refuse("walk_choose", "rows", "0 to " + std::to_string(table_rows() - 1), std::to_string(row));
}

WalkMarkArguments::WalkMarkArguments(const Tensor& bits, const Tensor& edges, int64_t target)
    : edges_(edges) {
  const char* op = "walk_mark_";
  if (bits.dim() != 1) refuse(op, "bits", "1 dimension", describe(bits));
  check_list(op, "bits", bits, bits.size(0), bits);
  if (!bits.is_contiguous()) refuse(op, "bits", "a contiguous tensor to write to", "strides");
  if (edges.dim() != 2) refuse(op, "edges", "2 dimensions [walks, steps]", describe(edges));
  check_tensor(op, "edges", edges, ScalarType::Long, {edges.size(0), edges.size(1)}, bits);
  check_at_least(op, "target", target, 0);
  places_ = bits.size(0) * 64;
}

void WalkMarkArguments::check_edges() const {
  const int64_t walks = edges_.size(0), steps = edges_.size(1);
  const int64_t walk_stride = edges_.stride(0), step_stride = edges_.stride(1);
  const int64_t* const edge = edges();
  const auto at = [=](int64_t walk, int64_t s) {
    return edge[walk * walk_stride + s * step_stride];
  };
  int64_t last = -1;
  for (int64_t s = 0; s < steps; ++s) {  // steps outside: a step of all walks lies side by side
    for (int64_t walk = 0; walk < walks; ++walk) last = std::max(last, at(walk, s));
  }
  if (last < places_) return;
  for (int64_t walk = 0; walk < walks; ++walk) {
    for (int64_t s = 0; s < steps; ++s) {
      if (at(walk, s) >= places_) refuse_edge(at(walk, s));
    }
  }
}

void WalkMarkArguments::refuse_edge(int64_t edge) const {
  refuse("walk_mark_", "edges", "places below " + std::to_string(places_), std::to_string(edge));
}

}  // namespace pathprune
