// Products with sparse weights on the CPU. Every sum is formed by one thread in an order that
// depends on the pattern and the shapes alone.

#include "ops/sparse.h"

#include <algorithm>
#include <vector>

#include "core/macros.h"
#include "glue/cpu.h"
#include "glue/cpu_ops.h"
#include "glue/pattern.h"

namespace pathprune {
namespace {

constexpr int64_t kLanes = 16;
// Units that are packed, and entries that are mapped or placed, by a thread at a time.
constexpr int64_t kPackedUnits = 512;
constexpr int64_t kEntriesAtOnce = 1 << 16;

// Calls visit(begin, end) for parts of 0 .. count - 1, on torch's threads.
template <typename Visit>
void in_parts(int64_t count, int64_t part, const Visit& visit) {
  torch::stable::parallel_for(0, ceil_divide(count, part), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) visit(i * part, std::min(count, (i + 1) * part));
  });
}

// Calls visit(rows, which part of them) for blocks of rows of every group, `parts` times each.
template <typename Visit>
void for_rows(const Pattern& w, int64_t parts, const Visit& visit) {
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t share = ceil_divide(w.rows, std::max<int64_t>(1, 4 * threads));
  const int64_t count =
      std::clamp<int64_t>(ceil_divide(share, kLanes) * kLanes, kLanes, kSparseRows);
  const int64_t blocks = ceil_divide(w.rows, count);
  in_parts(w.groups * parts * blocks, 1, [&](int64_t i, int64_t) {
    const int64_t begin = i % blocks * count;
    visit(Rows{i / blocks / parts, begin, std::min(w.rows, begin + count)}, i / blocks % parts);
  });
}

// A flow [groups, T, units] with positions side by side, cut into panels of about equal width.
template <typename A>
class Panels {
 public:
  Panels(const Tensor& flow, int64_t most_vectors)
      : positions_(flow.size(1)), units_(flow.size(2)), vectors_(ceil_divide(positions_, kLanes)) {
    const int64_t panels = ceil_divide(vectors_, most_vectors);
    each_ = panels ? ceil_divide(vectors_, panels) : 1;
    data_ = new_tensor(flow, {flow.size(0), vectors_ * kLanes * units_}, flow.scalar_type());
    const auto kernels = PP_BY_ISA(sparse_kernels<A>)();
    const auto strides = flow.strides();
    const auto* from = static_cast<const A*>(flow.const_data_ptr());
    const int64_t parts = ceil_divide(units_, kPackedUnits);
    in_parts(flow.size(0) * count() * parts, 1, [&](int64_t i, int64_t) {
      const int64_t group = i / parts / count(), panel = i / parts % count();
      const int64_t unit = i % parts * kPackedUnits;
      const Strided<const A> x = {from + group * strides[0] + first(panel) * strides[1], strides[1],
                                  strides[2]};
      kernels.pack(x, positions(panel), unit, std::min(units_, unit + kPackedUnits), vectors(panel),
                   at(group, panel));
    });
  }

  int64_t count() const { return ceil_divide(vectors_, each_); }
  int64_t first(int64_t panel) const { return panel * each_ * kLanes; }  // position
  int64_t positions(int64_t panel) const {
    return std::min(positions_ - first(panel), each_ * kLanes);
  }
  int vectors(int64_t panel) const {
    return static_cast<int>(ceil_divide(positions(panel), kLanes));
  }
  A* at(int64_t group, int64_t panel) const {
    return data_of<A>(data_) + (group * vectors_ * kLanes + first(panel)) * units_;
  }

 private:
  int64_t positions_, units_, vectors_, each_;
  Tensor data_;
};

// [stored] in A: f of the values, which are given back where that is what they are.
template <typename A>
Tensor mapped_values(const Tensor& values, Storage storage, WeightMap f, int64_t stored) {
  const bool is_mapped =
      f == WeightMap::kIdentity && (storage == Storage::kFloat32 || storage == Storage::kFloat64);
  if (is_mapped) return values;
  const auto type = storage == Storage::kFloat64 ? ScalarType::Double : ScalarType::Float;
  const Tensor mapped = new_tensor(values, {stored}, type);
  Weights w = {};
  w.values = values.const_data_ptr();
  w.storage = storage;
  const auto kernels = PP_BY_ISA(sparse_kernels<A>)();
  in_parts(stored, kEntriesAtOnce,
           [&](int64_t begin, int64_t end) { kernels.map(w, f, begin, end, data_of<A>(mapped)); });
  return mapped;
}

enum Kernel : int64_t { kChosen, kLanesOfPositions, kGather, kExpand };

Kernel check_kernel(const char* op, int64_t code, int64_t positions) {
  if (code < kChosen || code > kExpand) refuse(op, "kernel", "0 to 3", std::to_string(code));
  if (code > kLanesOfPositions && positions != 1) {
    refuse(op, "kernel", "0 or 1 for T = " + std::to_string(positions), std::to_string(code));
  }
  return static_cast<Kernel>(code);
}

bool is_by_bits(const Pattern& w, int64_t stored, double from) {
  return static_cast<double>(stored) >= from * static_cast<double>(w.groups * w.rows * w.columns);
}

template <typename A>
void multiply_one(const Pattern& w, const A* values, int64_t stored, const Tensor& x, Kernel kernel,
                  const Tensor& y) {
  const auto kernels = PP_BY_ISA(sparse_kernels<A>)();
  const Tensor flow = padded_flow(torch::stable::contiguous(x), 1, w.words * kWordColumns);
  const bool expands = kernel == kExpand || (kernel == kChosen && !w.order &&
                                             is_by_bits(w, stored, kernels.expand_from));
  const auto multiply = expands ? kernels.expand : kernels.gather;
  for_rows(w, 1, [&](const Rows& rows, int64_t) {
    multiply(w, rows, values, data_of<A>(flow) + rows.group * w.words * kWordColumns,
             data_of<A>(y) + rows.group * w.rows);
  });
}

// Calls visit(group, first word, last word) for the columns of every group, a part for each thread.
template <typename Visit>
void for_words(const Pattern& w, const Visit& visit) {
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t words = std::max<int64_t>(ceil_divide(w.words, threads), 1);
  const int64_t parts = ceil_divide(w.words, words);
  in_parts(w.groups * parts, 1, [&](int64_t i, int64_t) {
    const int64_t first = i % parts * words;
    visit(i / parts, first, std::min(w.words, first + words));
  });
}

// The transposed product for one position, without the transpose: every thread takes some columns,
// whose sums it forms row by row.
template <typename A>
void multiply_one_transposed(const Pattern& w, const A* values, int64_t stored, const Tensor& g,
                             const Tensor& y) {
  const auto kernels = PP_BY_ISA(sparse_kernels<A>)();
  const bool by_bits = is_by_bits(w, stored, kernels.update_from);
  const Tensor flow = torch::stable::contiguous(g);
  for_words(w, [&](int64_t group, int64_t first, int64_t last) {
    std::vector<A> sums((last - first) * kLanes);
    kernels.spread(w, group, first, last, by_bits, values, data_of<A>(flow) + group * w.rows,
                   sums.data());
    const int64_t begin = first * kLanes, end = std::min(w.columns, last * kLanes);
    std::copy_n(sums.data(), end - begin, data_of<A>(y) + group * w.columns + begin);
  });
}

// A flow of up to kFewPositions in panels [units, 8], one for each group.
template <typename A>
class FewPanels {
 public:
  explicit FewPanels(const Tensor& flow)
      : units_(flow.size(2)),
        data_(new_tensor(flow, {flow.size(0), units_, kFewPositions}, flow.scalar_type())) {
    const auto kernels = PP_BY_ISA(sparse_kernels<A>)();
    const auto strides = flow.strides();
    const auto* from = static_cast<const A*>(flow.const_data_ptr());
    for (int64_t group = 0; group < flow.size(0); ++group) {
      const Strided<const A> x = {from + group * strides[0], strides[1], strides[2]};
      kernels.pack_few(x, flow.size(1), units_, data_of<A>(data_) + group * units_ * kFewPositions);
    }
  }

  const A* at(int64_t group) const { return data_of<A>(data_) + group * units_ * kFewPositions; }

 private:
  int64_t units_;
  Tensor data_;
};

bool is_few(int64_t positions) { return positions > 1 && positions <= kFewPositions; }

template <typename A>
void multiply_few(const Pattern& w, const A* values, const Tensor& x, const Tensor& y) {
  const auto kernels = PP_BY_ISA(sparse_kernels<A>)();
  const FewPanels<A> panels(x);
  const int64_t positions = x.size(1);
  for_rows(w, 1, [&](const Rows& rows, int64_t) {
    kernels.multiply_few(w, rows, values, panels.at(rows.group), positions,
                         data_of<A>(y) + rows.group * positions * w.rows);
  });
}

template <typename A>
void multiply_few_transposed(const Pattern& w, const A* values, const Tensor& g, const Tensor& y) {
  const auto kernels = PP_BY_ISA(sparse_kernels<A>)();
  const FewPanels<A> panels(g);
  const int64_t positions = g.size(1);
  for_words(w, [&](int64_t group, int64_t first, int64_t last) {
    kernels.spread_few(w, group, first, last, values, panels.at(group), positions,
                       data_of<A>(y) + group * positions * w.columns);
  });
}

template <typename A>
void multiply_many(const Pattern& w, const A* values, const Tensor& x, const Tensor& y) {
  const auto kernels = PP_BY_ISA(sparse_kernels<A>)();
  const Panels<A> panels(x, kernels.most_vectors);
  const int64_t positions = x.size(1);
  for_rows(w, panels.count(), [&](const Rows& rows, int64_t panel) {
    A* to = data_of<A>(y) + (rows.group * positions + panels.first(panel)) * w.rows;
    kernels.multiply(w, rows, values, panels.at(rows.group, panel), panels.vectors(panel),
                     panels.positions(panel), Strided<A>{to, w.rows, 1});
  });
}

// Calls function(A()).
template <typename Function>
auto by_type(ScalarType type, const Function& function) {
  return type == ScalarType::Double ? function(double()) : function(float());
}

// ---- the index ----------------------------------------------------------------------------------

constexpr int64_t kIndexedAtOnce = 512;  // columns
constexpr int64_t kWordsAtOnce = 4;

// Calls visit(row, column, which entry) for the entries in columns begin .. end - 1 of a group, row
// by row; both are multiples of 16.
template <typename Visit>
void for_entries(const Pattern& w, int64_t group, int64_t begin, int64_t end, const Visit& visit) {
  const auto count = PP_BY_ISA(mask_kernels)().count;
  const int64_t first = begin / kWordColumns, last = std::min(w.words, end / kWordColumns);
  for (int64_t row = 0; row < w.rows; ++row) {
    const int64_t flat_row = group * w.rows + row;
    const uint16_t* layout = w.layout + flat_row * w.words;
    int64_t entry = w.row_start[flat_row] + count(layout, first);
    // Four words at a time: the branch that ends a loop over bits is foreseen badly.
    for (int64_t word = first; word < last; word += kWordsAtOnce) {
      const int64_t here = std::min(kWordsAtOnce, last - word);
      uint64_t bits = 0;
      for (int64_t i = 0; i < here; ++i) bits |= uint64_t{layout[word + i]} << (kWordColumns * i);
      for (; bits; bits &= bits - 1) {
        visit(row, word * kWordColumns + __builtin_ctzll(bits), entry++);
      }
    }
  }
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> sparse_index(const Tensor& layout,
                                                                const Tensor& row_start,
                                                                int64_t columns) {
  const char* op = "sparse_index";
  if (layout.dim() != 3) refuse(op, "layout", "3 dimensions [G, O, W]", describe(layout));
  check_at_least(op, "columns", columns, 0);
  const int64_t groups = layout.size(0), rows = layout.size(1), words = words_of(columns);
  check_tensor(op, "layout", layout, ScalarType::Short, {groups, rows, words}, layout);
  check_tensor(op, "row_start", row_start, ScalarType::Long, {groups * rows + 1}, layout);
  const Tensor bits = torch::stable::contiguous(layout);
  const Tensor starts = torch::stable::contiguous(row_start);
  const Pattern w = {data_of<uint16_t>(bits),
                     data_of<int64_t>(starts),
                     nullptr,
                     nullptr,
                     groups,
                     rows,
                     columns,
                     words};
  const int64_t stored = w.row_start[groups * rows];
  const int64_t live = PP_BY_ISA(mask_kernels)().count(w.layout, groups * rows * words);
  if (stored != live || stored > INT32_MAX) {
    refuse(
        op, "row_start",
        stored != live ? std::to_string(live) + " entries, as layout" : "at most 2^31 - 1 entries",
        std::to_string(stored));
  }
  const int64_t words_t = words_of(rows);
  const Tensor index = new_tensor(layout, {stored}, ScalarType::Short);
  const Tensor layout_t = torch::stable::new_zeros(bits, {groups, columns, words_t});
  const Tensor row_start_t = new_tensor(layout, {groups * columns + 1}, ScalarType::Long);
  const Tensor index_t = new_tensor(layout, {stored}, ScalarType::Short);
  const Tensor order = new_tensor(layout, {stored}, ScalarType::Int);
  auto* const start_t = data_of<int64_t>(row_start_t);
  auto* const to = data_of<uint16_t>(index);
  auto* const to_t = data_of<uint16_t>(index_t);
  // By blocks of columns, whose entries then are written near one another.
  const int64_t blocks = ceil_divide(columns, kIndexedAtOnce);
  std::fill(start_t, start_t + groups * columns + 1, 0);
  in_parts(groups * blocks, 1, [&](int64_t i, int64_t) {
    const int64_t group = i / blocks, begin = i % blocks * kIndexedAtOnce;
    int64_t* const count = start_t + group * columns + 1;
    for_entries(w, group, begin, begin + kIndexedAtOnce,
                [&](int64_t, int64_t column, int64_t entry) {
                  to[entry] = static_cast<uint16_t>(column);
                  ++count[column];
                });
  });
  for (int64_t c = 0; c < groups * columns; ++c) start_t[c + 1] += start_t[c];
  in_parts(groups * blocks, 1, [&](int64_t i, int64_t) {
    const int64_t group = i / blocks, begin = i % blocks * kIndexedAtOnce;
    int64_t next[kIndexedAtOnce];
    for (int64_t c = 0; c < std::min(kIndexedAtOnce, columns - begin); ++c) {
      next[c] = start_t[group * columns + begin + c];
    }
    uint16_t* const column_bits = data_of<uint16_t>(layout_t) + group * columns * words_t;
    for_entries(w, group, begin, begin + kIndexedAtOnce,
                [&](int64_t row, int64_t column, int64_t entry) {
                  const int64_t place = next[column - begin]++;
                  to_t[place] = static_cast<uint16_t>(row);
                  data_of<int32_t>(order)[place] = static_cast<int32_t>(entry);
                  column_bits[column * words_t + row / kWordColumns] |=
                      static_cast<uint16_t>(1 << (row % kWordColumns));
                });
  });
  return {index, layout_t, row_start_t, index_t, order};
}

Tensor sparse_matmul(const Tensor& values, const Tensor& x, int64_t f, bool transposed,
                     int64_t kernel, const Tensor& layout, const Tensor& row_start,
                     const Tensor& index, const OptionalTensor& layout_t,
                     const OptionalTensor& row_start_t, const OptionalTensor& index_t,
                     const OptionalTensor& order, int64_t columns) {
  const char* op = "sparse_matmul";
  const bool t = transposed;  // what is not used is not looked at
  const PatternArguments pattern(op, layout, row_start, index, t ? layout_t : std::nullopt,
                                 t ? row_start_t : std::nullopt, t ? index_t : std::nullopt,
                                 t ? order : std::nullopt, columns);
  const Pattern& w = transposed ? pattern.transposed(op) : pattern.view();
  const Storage storage = check_storage(op, "values", values);
  const WeightMap map = check_map(op, "f", f);
  pattern.check_values(op, values);
  const auto type = storage == Storage::kFloat64 ? ScalarType::Double : ScalarType::Float;
  pattern.check_flow(op, "x", x, type, w.columns);
  const int64_t positions = x.size(1);
  const Kernel chosen = check_kernel(op, kernel, positions);
  const Tensor stored = torch::stable::contiguous(values);
  const Tensor y = new_tensor(x, {w.groups, positions, w.rows}, type);
  by_type(type, [&]<typename A>(A) {
    const Tensor mapped = mapped_values<A>(stored, storage, map, pattern.stored());
    const auto* data = static_cast<const A*>(mapped.const_data_ptr());
    const int64_t entries = pattern.stored();
    if (t && positions == 1 && chosen == kChosen && columns <= kIndexedColumns) {
      multiply_one_transposed(pattern.view(), data, entries, x, y);
    } else if (positions == 1 && chosen != kLanesOfPositions) {
      multiply_one(w, data, entries, x, chosen, y);
    } else if (is_few(positions) && !t) {
      multiply_few(w, data, x, y);
    } else if (is_few(positions) && columns <= kIndexedColumns) {
      multiply_few_transposed(pattern.view(), data, x, y);
    } else {
      multiply_many(w, data, x, y);
    }
  });
  return y;
}

Tensor sparse_sample(const Tensor& x, const Tensor& g, const Tensor& layout,
                     const Tensor& row_start, const Tensor& index, const OptionalTensor& layout_t,
                     const OptionalTensor& row_start_t, const OptionalTensor& index_t,
                     const OptionalTensor& order, int64_t columns) {
  const char* op = "sparse_sample";
  const PatternArguments pattern(op, layout, row_start, index, std::nullopt, std::nullopt,
                                 std::nullopt, std::nullopt, columns);
  const Pattern& w = pattern.view();
  const auto type = x.scalar_type();
  if (type != ScalarType::Float && type != ScalarType::Double) {
    refuse(op, "x", "float32 or float64", describe(x));
  }
  pattern.check_flow(op, "x", x, type, w.columns);
  pattern.check_flow(op, "g", g, type, w.rows);
  if (x.size(1) != g.size(1)) {
    refuse(op, "g", "T = " + std::to_string(x.size(1)) + ", as x", describe(g));
  }
  if (x.size(1) == 0) return torch::stable::new_zeros(x, {pattern.stored()});
  const Tensor sums = new_tensor(x, {pattern.stored()}, type);
  by_type(type, [&]<typename A>(A) {
    const auto kernels = PP_BY_ISA(sparse_kernels<A>)();
    if (x.size(1) == 1 && columns <= kIndexedColumns) {
      const Tensor flow = padded_flow(torch::stable::contiguous(x), 1, w.words * kWordColumns);
      const Tensor at = torch::stable::contiguous(g);
      const bool by_bits = is_by_bits(w, pattern.stored(), kernels.update_from);
      for_rows(w, 1, [&](const Rows& rows, int64_t) {
        kernels.outer(w, rows, by_bits, data_of<A>(flow) + rows.group * w.words * kWordColumns,
                      data_of<A>(at) + rows.group * w.rows, data_of<A>(sums));
      });
      return;
    }
    if (is_few(x.size(1))) {
      const FewPanels<A> from(x), at(g);
      for_rows(w, 1, [&](const Rows& rows, int64_t) {
        kernels.sample_few(w, rows, from.at(rows.group), at.at(rows.group), data_of<A>(sums));
      });
      return;
    }
    const Panels<A> from(x, kernels.most_vectors), at(g, kernels.most_vectors);
    for_rows(w, 1, [&](const Rows& rows, int64_t) {
      for (int64_t panel = 0; panel < from.count(); ++panel) {
        kernels.sample(w, rows, from.at(rows.group, panel), at.at(rows.group, panel),
                       from.vectors(panel), panel > 0, data_of<A>(sums));
      }
    });
  });
  return sums;
}

Tensor sparse_gather(const Tensor& dense, const Tensor& layout, const Tensor& row_start,
                     const Tensor& index, int64_t columns) {
  const char* op = "sparse_gather";
  const PatternArguments pattern(op, layout, row_start, index, std::nullopt, std::nullopt,
                                 std::nullopt, std::nullopt, columns);
  const WeightArguments weight(op, dense, layout, std::nullopt, std::nullopt, columns);
  const Weights& w = weight.view();
  const Tensor values = new_tensor(dense, {pattern.stored()}, dense.scalar_type());
  const auto size = static_cast<int64_t>(values.element_size());
  char* const bytes = static_cast<char*>(values.mutable_data_ptr());
  const auto kernels = PP_BY_ISA(mask_kernels)();
  for_rows(pattern.view(), 1, [&](const Rows& rows, int64_t) {
    for (int64_t row = rows.begin; row < rows.end; ++row) {
      const int64_t flat_row = rows.group * w.rows + row;
      kernels.compact(w, flat_row, bytes + pattern.view().row_start[flat_row] * size);
    }
  });
  return values;
}

Tensor sparse_scatter(const Tensor& values, const Tensor& layout, const Tensor& row_start,
                      const Tensor& index, int64_t columns) {
  const char* op = "sparse_scatter";
  const PatternArguments pattern(op, layout, row_start, index, std::nullopt, std::nullopt,
                                 std::nullopt, std::nullopt, columns);
  check_storage(op, "values", values);
  pattern.check_values(op, values);
  const Pattern& w = pattern.view();
  const Tensor stored = torch::stable::contiguous(values);
  const Tensor dense = new_tensor(values, {w.groups, w.rows, columns}, values.scalar_type());
  const auto kernels = PP_BY_ISA(sparse_kernels<float>)();
  for_rows(w, 1, [&](const Rows& rows, int64_t) {
    kernels.scatter(w, rows, static_cast<int64_t>(values.element_size()), stored.const_data_ptr(),
                    dense.mutable_data_ptr());
  });
  return dense;
}

}  // namespace pathprune
