// The walk ops on CUDA; python/pathprune/walk_ops.py says what each one does. All of them wait for
// the device: whether units, rows and edges are there is found where they lie, and the exact stop
// is looked for by halves.

#include <cuda_runtime.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <tuple>

#include "glue/cuda.h"
#include "glue/walk_arguments.h"
#include "ops/kernels_cuda.h"

namespace pathprune::cuda {
namespace {

std::tuple<Tensor, Tensor> walk_step(const Tensor& weight, const Tensor& units, const Tensor& walks,
                                     const OptionalTensor& mass, const OptionalTensor& gain,
                                     const OptionalTensor& valid, int64_t power, bool to_rows,
                                     int64_t seed, int64_t step) {
  const char* op = "walk_step";
  const OnDevice device(weight);
  const WalkStepArguments arguments(weight, units, walks, mass, gain, valid, power, to_rows, seed,
                                    step);
  const WalkMatrix& m = arguments.matrix();
  const int64_t count = units.numel();
  const Tensor next = new_integers(units, count);
  const Tensor edge = new_integers(units, count);
  if (count == 0) return {next, edge};
  const Walkers walkers = {arguments.units(), arguments.walks(), count, data_of<int64_t>(next),
                           data_of<int64_t>(edge)};
  size_t bytes = 0;
  check(op, walk_step_bytes(m, count, &bytes));
  const Tensor workspace = new_bytes(weight, bytes);
  void* const place = workspace.mutable_data_ptr();
  check(op, count_walkers_at_units(m, walkers, place, device.stream()));
  const int64_t refused = read_one(op, static_cast<const int64_t*>(place), device.stream());
  if (refused) {
    arguments.refuse_unit(read_one(op, walkers.units + count - refused, device.stream()));
  }
  check(op, move_counted_walkers(m, arguments.rule(), walkers, place, device.stream()));
  return {next, edge};
}

Tensor walk_mass(const Tensor& weight, const OptionalTensor& valid, int64_t power) {
  const char* op = "walk_mass";
  const OnDevice device(weight);
  const Tensor none = new_integers(weight, 0);
  const WalkStepArguments arguments(weight, none, none, std::nullopt, std::nullopt, valid, power,
                                    true, 0, 0, op);
  const WalkMatrix& m = arguments.matrix();
  const Tensor mass = new_tensor(weight, {m.groups, m.rows, m.columns}, ScalarType::Double);
  check(op, sum_walk_kernels(m, arguments.rule(), data_of<double>(mass), device.stream()));
  return mass;
}

std::tuple<Tensor, Tensor, Tensor> walk_field_step(const Tensor& weight, const Tensor& units,
                                                   const Tensor& positions, const Tensor& walks,
                                                   const Tensor& flow, const Tensor& leads_to,
                                                   int64_t power, bool to_rows, int64_t seed,
                                                   int64_t step) {
  const char* op = "walk_field_step";
  const OnDevice device(weight);
  const WalkStepArguments arguments(weight, units, walks, std::nullopt, std::nullopt, std::nullopt,
                                    power, to_rows, seed, step, op);
  const WalkFieldArguments field_arguments(arguments, positions, flow, leads_to);
  const WalkMatrix& m = arguments.matrix();
  const int64_t count = units.numel();
  const Tensor next = new_integers(units, count);
  const Tensor next_position = new_integers(units, count);
  const Tensor edge = new_integers(units, count);
  const Walkers walkers = {arguments.units(), arguments.walks(), count, data_of<int64_t>(next),
                           data_of<int64_t>(edge)};
  const WalkField field = field_arguments.field(data_of<int64_t>(next_position));
  const FieldSizes sizes = {count, m.units(), field_arguments.places(), leads_to.numel()};
  const Tensor workspace = new_bytes(units, sizeof(FieldRefusals));
  auto* const place = data_of<FieldRefusals>(workspace);
  check(op, check_field_places(field, sizes, walkers.units, place, device.stream()));
  const FieldRefusals found = read_one(op, place, device.stream());
  const auto at = [&](const int64_t* things, int64_t all, int64_t refused) {
    return read_one(op, things + all - refused, device.stream());
  };
  if (found.unit) arguments.refuse_unit(at(walkers.units, count, found.unit));
  if (found.position) field_arguments.refuse_position(at(field.at, count, found.position));
  if (found.lead) field_arguments.refuse_lead(at(field.position, sizes.leads, found.lead));
  check(op, move_walkers_in_field(m, arguments.rule(), field, walkers, device.stream()));
  return {next, next_position, edge};
}

Tensor walk_choose(const Tensor& cdf, const Tensor& row_start, const Tensor& rows,
                   const Tensor& walks, int64_t seed, int64_t step, int64_t word) {
  const char* op = "walk_choose";
  const OnDevice device(cdf);
  const WalkChooseArguments arguments(cdf, row_start, rows, walks, word);
  const ChoiceTable& table = arguments.table();
  const int64_t count = rows.numel(), table_rows = arguments.table_rows();
  const Tensor chosen = new_integers(rows, count);
  const Tensor workspace = new_bytes(rows, sizeof(ChoiceRefusals));
  auto* const place = data_of<ChoiceRefusals>(workspace);
  check(op, check_choices(table, table_rows, arguments.rows(), count, place, device.stream()));
  const ChoiceRefusals found = read_one(op, place, device.stream());
  if (found.start) {
    const int64_t* const next = table.row_start + table_rows - found.start + 1;
    arguments.refuse_start(read_one(op, next, device.stream()));
  }
  arguments.check_end(found.last_start);
  if (found.row) {
    arguments.refuse_row(read_one(op, arguments.rows() + count - found.row, device.stream()));
  }
  check(op, choose_from_table(table, arguments.rows(), arguments.walks(), count,
                              static_cast<uint64_t>(seed), step, static_cast<WalkWord>(word),
                              data_of<int64_t>(chosen), device.stream()));
  return chosen;
}

// Marks whole walks; those of [begin, end) at once.
class Marker {
 public:
  Marker(const WalkMarkArguments& arguments, const Tensor& bits, int64_t steps, int64_t walks,
         cudaStream_t stream)
      : steps_(steps),
        stream_(stream),
        is_new_(new_bytes(bits, static_cast<size_t>(walks * steps))),
        found_(new_bytes(bits, sizeof(Marked))),
        to_{data_of<uint64_t>(bits), arguments.places(), arguments.edges(),
            data_of<uint8_t>(is_new_), data_of<Marked>(found_)} {}

  // How many places are new. An edge that is past the places is refused, and nothing is marked.
  int64_t mark(const WalkMarkArguments& arguments, int64_t begin, int64_t end) const {
    check(kOp, mark_places(to_, begin * steps_, end * steps_, stream_));
    const Marked found = read_one(kOp, to_.found, stream_);
    if (found.refused) {
      unmark(begin, end);
      arguments.refuse_edge(read_one(kOp, to_.edges + end * steps_ - found.refused, stream_));
    }
    return found.marked;
  }

  void unmark(int64_t begin, int64_t end) const {
    check(kOp, unmark_places(to_, begin * steps_, end * steps_, stream_));
  }

 private:
  static constexpr const char* kOp = "walk_mark_";
  int64_t steps_;
  cudaStream_t stream_;
  Tensor is_new_, found_;
  MarkedPlaces to_;
};

Tensor walk_mark_(const Tensor& bits, const Tensor& edges, int64_t target) {
  const OnDevice device(bits);
  const WalkMarkArguments arguments(bits, torch::stable::contiguous(edges), target);
  const int64_t walks = edges.size(0);
  const Marker marker(arguments, bits, edges.size(1), walks, device.stream());
  // The first `used` walks are marked, and mark fewer places than the target unless that is 0.
  int64_t used = walks, marked = marker.mark(arguments, 0, walks);
  if (marked >= target) {
    marker.unmark(0, walks);
    used = marked = 0;
    // The first `enough` walks would reach the target.
    for (int64_t enough = walks; marked < target;) {
      const int64_t middle = enough - used == 1 ? enough : used + (enough - used) / 2;
      const int64_t more = marker.mark(arguments, used, middle);
      if (marked + more < target || middle == enough) {
        marked += more;
        used = middle;
      } else {
        marker.unmark(used, middle);
        enough = middle;
      }
    }
  }
  const int64_t results[2] = {used, marked};
  const Tensor result = new_integers(bits, 2);
  check("walk_mark_", cudaMemcpyAsync(data_of<int64_t>(result), results, sizeof(results),
                                      cudaMemcpyHostToDevice, device.stream()));
  return result;
}

}  // namespace
}  // namespace pathprune::cuda

STABLE_TORCH_LIBRARY_IMPL(pathprune, CUDA, m) {
  m.impl("walk_step", TORCH_BOX(&pathprune::cuda::walk_step));
  m.impl("walk_mass", TORCH_BOX(&pathprune::cuda::walk_mass));
  m.impl("walk_field_step", TORCH_BOX(&pathprune::cuda::walk_field_step));
  m.impl("walk_choose", TORCH_BOX(&pathprune::cuda::walk_choose));
  m.impl("walk_mark_", TORCH_BOX(&pathprune::cuda::walk_mark_));
}
