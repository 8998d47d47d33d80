// The walk ops on the CPU. Walkers are grouped by the unit they are at, so that every unit's
// distribution is built once and its weights are read once; columns are read in tiles.

#include "ops/walk.h"

#include <algorithm>
#include <vector>

#include "glue/cpu.h"
#include "glue/walk_arguments.h"
#include "ops/walk_kernels.h"

namespace pathprune {
namespace {

// Walkers in the order of their units: those of unit u are order[start[u], start[u + 1]).
struct Grouped {
  std::vector<int64_t> start;
  std::vector<uint32_t> order;
};

// `place(i)` is the unit that walker i is at.
template <typename Place>
Grouped group_by_unit(int64_t count, int64_t units, const Place& place) {
  Grouped grouped = {std::vector<int64_t>(units + 1), std::vector<uint32_t>(count)};
  for (int64_t i = 0; i < count; ++i) ++grouped.start[place(i) + 1];
  for (int64_t u = 0; u < units; ++u) grouped.start[u + 1] += grouped.start[u];
  std::vector<int64_t> next(grouped.start.begin(), grouped.start.end() - 1);
  for (int64_t i = 0; i < count; ++i) grouped.order[next[place(i)]++] = static_cast<uint32_t>(i);
  return grouped;
}

size_t bytes_of(Storage storage) {
  return storage == Storage::kFloat64 ? 8 : storage == Storage::kFloat32 ? 4 : 2;
}

// The bytes of a row of a tile: whole cache lines, and few enough that a tile of usual height stays
// in the second-level cache.
constexpr int64_t kTileBytes = 128;

class Scratch {
 public:
  // Tiles of columns, each row of which has so many values of so many bytes.
  Scratch(const WalkMatrix& m, int64_t choices, int64_t tile_columns = 0, int64_t values = 1,
          int64_t value_bytes = 1)
      : weights_(choices),
        cdf_(cdf_room(choices) + kLine),
        // An odd number of cache lines: columns that began a power of two apart would evict each
        // other.
        pitch_(m.rows * values + 80 - m.rows * values % 64),
        tile_(tile_columns * pitch_ * value_bytes),
        view_{weights_.data(), aligned(cdf_.data()), tile_.data(), pitch_, &pending_} {}
  Scratch(const Scratch&) = delete;

  const WalkScratch& view() const { return view_; }
  const char* column(int64_t index, int64_t value_bytes) const {
    return tile_.data() + index * pitch_ * value_bytes;
  }

 private:
  static constexpr int64_t kLine = 8;  // numbers in a cache line, at which the CDF begins

  static uint64_t* aligned(uint64_t* numbers) {
    return numbers + kLine - reinterpret_cast<uintptr_t>(numbers) / sizeof(uint64_t) % kLine;
  }

  std::vector<double> weights_;
  std::vector<uint64_t> cdf_;
  int64_t pitch_;
  std::vector<char> tile_;
  WalkPending pending_;
  WalkScratch view_;
};

}  // namespace

std::tuple<Tensor, Tensor> walk_step(const Tensor& weight, const Tensor& units, const Tensor& walks,
                                     const OptionalTensor& mass, const OptionalTensor& gain,
                                     const OptionalTensor& valid, int64_t power, bool to_rows,
                                     int64_t seed, int64_t step) {
  const WalkStepArguments arguments(weight, units, walks, mass, gain, valid, power, to_rows, seed,
                                    step);
  const WalkMatrix& m = arguments.matrix();
  const WalkRule& rule = arguments.rule();
  const Tensor next = new_tensor(units, {units.numel()}, ScalarType::Long);
  const Tensor edge = new_tensor(units, {units.numel()}, ScalarType::Long);
  const Walkers walkers = {arguments.units(), arguments.walks(), units.numel(),
                           data_of<int64_t>(next), data_of<int64_t>(edge)};
  arguments.check_units(walkers.units, walkers.count);
  const Grouped grouped =
      group_by_unit(walkers.count, m.units(), [&](int64_t i) { return walkers.units[i]; });
  const WalkKernels kernels = PP_BY_ISA(walk_kernels)();
  const auto is_busy = [&](int64_t unit) { return grouped.start[unit] < grouped.start[unit + 1]; };
  const auto move = [&](const Scratch& scratch, const void* values, int64_t unit) {
    const int64_t begin = grouped.start[unit];
    kernels.unit(m, rule, walkers, scratch.view(), values, unit, grouped.order.data() + begin,
                 grouped.start[unit + 1] - begin);
  };
  // What a candidate is read from: its mass, or its kernel.
  const auto value_bytes = static_cast<int64_t>(rule.mass ? sizeof(double) : bytes_of(m.storage));
  const int64_t values = rule.mass ? 1 : m.entries;
  const char* from = static_cast<const char*>(rule.mass ? rule.mass : m.values);
  if (!to_rows) {
    const int64_t row_bytes = m.columns * values * value_bytes;
    torch::stable::parallel_for(0, m.units(), 16, [&](int64_t begin, int64_t end) {
      const Scratch scratch(m, m.candidates());
      for (int64_t u = begin; u < end; ++u) {
        if (is_busy(u)) move(scratch, from + u * row_bytes, u);
      }
      kernels.settle(m, rule, walkers, scratch.view());
    });
    return {next, edge};
  }
  const int64_t tile = std::max<int64_t>(kTileBytes / (values * value_bytes), 1);
  const int64_t tiles = (m.columns + tile - 1) / tile;
  torch::stable::parallel_for(0, m.groups * tiles, 1, [&](int64_t begin, int64_t end) {
    const Scratch scratch(m, m.candidates(), tile, values, value_bytes);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t group = i / tiles, column = i % tiles * tile;
      const int64_t count = std::min(tile, m.columns - column);
      const int64_t first = group * m.columns + column;
      int64_t busy = 0;
      for (int64_t c = 0; c < count; ++c) busy += is_busy(first + c);
      if (!busy) continue;
      kernels.transpose(m, rule, scratch.view(), group, column, count);
      for (int64_t c = 0; c < count; ++c) {
        if (is_busy(first + c)) move(scratch, scratch.column(c, value_bytes), first + c);
      }
    }
    kernels.settle(m, rule, walkers, scratch.view());
  });
  return {next, edge};
}

Tensor walk_mass(const Tensor& weight, const OptionalTensor& valid, int64_t power) {
  const Tensor none = torch::stable::empty({0}, ScalarType::Long);
  const WalkStepArguments arguments(weight, none, none, std::nullopt, std::nullopt, valid, power,
                                    true, 0, 0, "walk_mass");
  const WalkMatrix& m = arguments.matrix();
  const Tensor mass = new_tensor(weight, {m.groups, m.rows, m.columns}, ScalarType::Double);
  const WalkKernels kernels = PP_BY_ISA(walk_kernels)();
  torch::stable::parallel_for(0, mass.numel(), 1 << 12, [&](int64_t begin, int64_t end) {
    kernels.mass(m, arguments.rule(), begin, end, data_of<double>(mass));
  });
  return mass;
}

std::tuple<Tensor, Tensor, Tensor> walk_field_step(const Tensor& weight, const Tensor& units,
                                                   const Tensor& positions, const Tensor& walks,
                                                   const Tensor& flow, const Tensor& leads_to,
                                                   int64_t power, bool to_rows, int64_t seed,
                                                   int64_t step) {
  const WalkStepArguments arguments(weight, units, walks, std::nullopt, std::nullopt, std::nullopt,
                                    power, to_rows, seed, step, "walk_field_step");
  const WalkMatrix& m = arguments.matrix();
  const WalkFieldArguments field_arguments(arguments, positions, flow, leads_to);
  const Tensor next = new_tensor(units, {units.numel()}, ScalarType::Long);
  const Tensor next_position = new_tensor(units, {units.numel()}, ScalarType::Long);
  const Tensor edge = new_tensor(units, {units.numel()}, ScalarType::Long);
  const Walkers walkers = {arguments.units(), arguments.walks(), units.numel(),
                           data_of<int64_t>(next), data_of<int64_t>(edge)};
  const WalkField field = field_arguments.field(data_of<int64_t>(next_position));
  arguments.check_units(walkers.units, walkers.count);
  field_arguments.check_positions();
  const int64_t places = leads_to.size(0), states = m.units() * places;
  const Grouped grouped = group_by_unit(
      walkers.count, states, [&](int64_t i) { return walkers.units[i] * places + field.at[i]; });
  const WalkKernels kernels = PP_BY_ISA(walk_kernels)();
  torch::stable::parallel_for(0, states, 1, [&](int64_t begin, int64_t end) {
    const Scratch scratch(m, m.candidates() * m.entries);
    for (int64_t state = begin; state < end; ++state) {
      const int64_t first = grouped.start[state], count = grouped.start[state + 1] - first;
      if (!count) continue;
      kernels.field(m, arguments.rule(), field, walkers, scratch.view(), state / places,
                    state % places, grouped.order.data() + first, count);
    }
  });
  return {next, next_position, edge};
}

Tensor walk_choose(const Tensor& cdf, const Tensor& row_start, const Tensor& rows,
                   const Tensor& walks, int64_t seed, int64_t step, int64_t word) {
  const WalkChooseArguments arguments(cdf, row_start, rows, walks, word);
  const Tensor chosen = new_tensor(rows, {rows.numel()}, ScalarType::Long);
  int64_t* to = data_of<int64_t>(chosen);
  arguments.check_rows();
  torch::stable::parallel_for(0, rows.numel(), 1 << 12, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      to[i] = choose_in_row(arguments.table(), arguments.rows()[i], arguments.walks()[i],
                            static_cast<uint64_t>(seed), step, static_cast<WalkWord>(word));
    }
  });
  return chosen;
}

Tensor walk_mark_(const Tensor& bits, const Tensor& edges, int64_t target) {
  const WalkMarkArguments arguments(bits, edges, target);
  const auto words = static_cast<uint64_t*>(bits.mutable_data_ptr());
  const int64_t* edge = arguments.edges();
  const int64_t walks = edges.size(0), steps = edges.size(1);
  const int64_t walk_stride = edges.stride(0), step_stride = edges.stride(1);
  arguments.check_edges();
  const auto mark = [&](int64_t place) -> int64_t {
    if (place < 0) return 0;
    uint64_t& word = words[place / 64];
    const uint64_t bit = uint64_t{1} << (place % 64);
    const bool is_new = !(word & bit);
    word |= bit;
    return is_new;
  };
  int64_t marked = 0, walk = 0;
  while (walk < walks && marked < target) {
    // Walks that cannot reach the target, whichever they are, are marked step by step: the bits of
    // one weight stay in the second-level cache.
    constexpr int64_t kMost = 4096, kLeast = 64;
    const int64_t safe =
        std::min({kMost, walks - walk, (target - marked) / std::max(steps, int64_t{1})});
    const int64_t here = safe >= kLeast ? safe : 1;
    for (int64_t s = 0; s < steps; ++s) {
      const int64_t* mine = edge + walk * walk_stride + s * step_stride;
      for (int64_t w = 0; w < here; ++w) marked += mark(mine[w * walk_stride]);
    }
    walk += here;
  }
  const Tensor result = new_tensor(bits, {2}, ScalarType::Long);
  data_of<int64_t>(result)[0] = walk;
  data_of<int64_t>(result)[1] = marked;
  return result;
}

}  // namespace pathprune
