// Convolutions by weights that are mostly zeros, on the CPU. Every sum is formed by one thread, in
// the order of the entries.

#include "ops/thin.h"

#include <algorithm>
#include <functional>
#include <vector>

#include "core/macros.h"
#include "glue/cpu.h"
#include "glue/cpu_ops.h"
#include "glue/thin_arguments.h"
#include "ops/thin_tiling.h"

namespace pathprune {
namespace {

constexpr const char* kOp = "thin_convolution";

// The weights without their zeros, by blocks of channels. Channels without any are left out.
template <typename A>
class ThinWeights {
 public:
  ThinWeights(const A* w, const ThinShape& s, bool counting) : counting(counting), w_(w), s_(s) {
    for (int64_t c = 0; c < s.channels; ++c) {
      bool read = false;
      for (int64_t r = 0; r < s.rows && !read; ++r) read = count(at(r, c), s.kernel()) > 0;
      if (read) channels.push_back(c);
    }
    const int64_t whole = static_cast<int64_t>(channels.size()) * s.kernel();
    for (int64_t r = 0; r < s.rows; ++r) {
      const int64_t ones = count(at(r, 0), s.channels * s.kernel());
      lacks.push_back(counting && 2 * ones > whole);
      entries_ += lacks.back() ? whole - ones : ones;
    }
  }

  ThinLeft left() const {
    return {s_.rows + counting, static_cast<int64_t>(channels.size()), entries_};
  }

  void lay_out(const ThinTiling& t) {
    std::vector<int32_t> shift(t.block * s_.kernel());
    for (int64_t i = 0; i < t.block * s_.kernel(); ++i) {
      shift[i] = static_cast<int32_t>(i / s_.kernel() * t.x_plane + t.shift(i % s_.kernel()));
    }
    const auto live = static_cast<int64_t>(channels.size());
    const int64_t whole = counting ? live * s_.kernel() : 0;
    // with room for what is written and left behind
    shifts.resize(entries_ + whole + 1);
    values.resize(entries_ + whole + 1);
    for (int64_t b = 0; b < t.blocks; ++b) {
      const int64_t first = b * t.block, some = std::min(t.block, live - first);
      for (int64_t r = 0; r < s_.rows; ++r) add(r, channels.data() + first, some, shift.data());
      if (counting) {
        begin.push_back(end_);
        std::copy_n(shift.data(), some * s_.kernel(), shifts.data() + end_);
        std::fill_n(values.data() + end_, some * s_.kernel(), A(1));
        end_ += some * s_.kernel();
      }
    }
    begin.push_back(end_);
  }

  // Those of the rows from one on, and a block; a last row, if counting, is the whole kernel.
  ThinEntries<A> entries(int64_t block, int64_t row) const {
    return {begin.data() + block * (s_.rows + counting) + row, shifts.data(), values.data()};
  }

  bool counting;
  std::vector<int64_t> channels;
  std::vector<bool> lacks;     // rows that are what is left of the whole kernel
  std::vector<int64_t> begin;  // of every block and row
  std::vector<int32_t> shifts;
  std::vector<A> values;

 private:
  const A* at(int64_t row, int64_t channel) const {
    return w_ + (row * s_.channels + channel) * s_.kernel();
  }
  static int64_t count(const A* from, int64_t size) {
    return std::count_if(from, from + size, [](A value) { return value != 0; });
  }

  // Without a branch: every entry is written, and the next over it if it was zero.
  void add(int64_t row, const int64_t* of, int64_t some, const int32_t* shift) {
    begin.push_back(end_);
    const A less = lacks[row];
    int64_t end = end_;
    for (int64_t i = 0; i < some; ++i) {
      const A* from = at(row, of[i]);
      for (int64_t k = 0; k < s_.kernel(); ++k) {
        shifts[end] = *shift++;
        values[end] = from[k] - less;
        end += values[end] != 0;
      }
    }
    end_ = end;
  }

  const A* w_;
  const ThinShape& s_;
  int64_t entries_ = 0, end_ = 0;
};

template <typename A>
class Convolution {
 public:
  using Chunk = ThinTiling::Chunk;

  Convolution(const ThinWeights<A>& w, const ThinTiling& t, const LaneKernels<A>& lanes,
              const ThinKernels<A>& kernels, const A* x, const A* bias, A* y)
      : w_(w), t_(t), lanes_(lanes), kernels_(kernels), x_(x), y_(y), start_(t.shape.rows + 1) {
    if (bias) std::copy_n(bias, t.shape.rows, start_.begin());
  }

  // For so many rows at once.
  int64_t scratch(int64_t rows) const {
    return (rows + w_.counting) * t_.outer_plane + t_.block * t_.x_plane;
  }

  // A chunk of the outputs of some rows.
  void run(int64_t chunk, int64_t first_row, int64_t end_row, A* y) const {
    const Chunk c = t_.chunk(chunk);
    const int64_t rows = end_row - first_row;
    A* const x = y + (rows + w_.counting) * t_.outer_plane;
    const auto live = static_cast<int64_t>(w_.channels.size());
    for (int64_t b = 0; b < t_.blocks; ++b) {
      const int64_t first = b * t_.block;
      lay_channels(lanes_, t_, c, x_, w_.channels.data() + first, std::min(t_.block, live - first),
                   x);
      const A* start = b == 0 ? start_.data() : nullptr;
      add_tiles(c, w_.entries(b, first_row), rows, start ? start + first_row : nullptr, x, y);
      if (w_.counting) {
        const int64_t whole = t_.shape.rows;
        add_tiles(c, w_.entries(b, whole), 1, start ? start + whole : nullptr, x,
                  y + rows * t_.outer_plane);
      }
    }
    for (int64_t r = 0; r < rows; ++r) {
      A* const made = y + r * t_.outer_plane;
      if (w_.lacks[first_row + r]) {
        const A* const whole = y + rows * t_.outer_plane;
        std::transform(made, made + t_.outer_plane, whole, made, std::plus<A>());
      }
      take(c, first_row + r, made);
    }
  }

 private:
  void add_tiles(const Chunk& c, const ThinEntries<A>& w, int64_t rows, const A* start, const A* x,
                 A* y) const {
    t_.for_each_tile(c, [&](const ThinPlace& p) {
      const ThinTile<A> tile = {x + p.x, y + p.outer, start,     t_.outer_plane, p.height,
                                p.width, t_.x_pitch,  t_.x_step, t_.outer_pitch};
      kernels_.add(w, rows, tile);
    });
  }

  // Writes a row's outputs.
  void take(const Chunk& c, int64_t row, const A* made) const {
    const ThinShape& s = t_.shape;
    A* to[kMostThinLanes];
    int64_t height[kMostThinLanes], level = c.height;
    for (int64_t l = 0; l < t_.lanes; ++l) {
      const auto lane = t_.lane(c, l);
      const int64_t top = lane.first + c.top;
      height[l] = lane.is_filled ? std::clamp<int64_t>(lane.end - top, 0, c.height) : 0;
      to[l] = height[l] ? y_ + (lane.image * s.rows + row) * s.plane() + top * s.x.out() + c.left
                        : nullptr;
      if (to[l]) level = std::min(level, height[l]);
    }
    // Rows follow one another in memory where a chunk is as wide as the outputs.
    const int64_t at_once = c.width == s.x.out() ? level : 1;
    for (int64_t i = 0; i < c.height;) {
      const int64_t count = i < level ? at_once : 1;
      lanes_.take(made, count * c.width, to);
      i += count;
      made += count * t_.outer_pitch;
      for (int64_t l = 0; l < t_.lanes; ++l) {
        if (to[l]) to[l] = i < height[l] ? to[l] + count * s.x.out() : nullptr;
      }
    }
  }

  const ThinWeights<A>& w_;
  const ThinTiling& t_;
  const LaneKernels<A>& lanes_;
  const ThinKernels<A>& kernels_;
  const A* x_;
  A* y_;
  std::vector<A> start_;  // of the sums
};

template <typename A>
void convolve(const ThinShape& s, bool counting, const Tensor& x, const Tensor& w,
              const OptionalTensor& bias, const Tensor& y) {
  const auto kernels = PP_BY_ISA(thin_kernels<A>)();
  const auto lanes = PP_BY_ISA(lane_kernels<A>)();
  ThinWeights<A> weights(static_cast<const A*>(w.const_data_ptr()), s, counting);
  const ThinTiling t(s, weights.left(), kernels.tile, lanes.lanes, sizeof(A));
  check_reads(kOp, x, t);
  weights.lay_out(t);
  const Convolution<A> made(weights, t, lanes, kernels, static_cast<const A*>(x.const_data_ptr()),
                            data_or_null<A>(bias), data_of<A>(y));
  // Where chunks are few, threads share the rows of one.
  const int64_t spans =
      std::clamp<int64_t>(ceil_divide(torch::stable::get_num_threads(), t.chunks()), 1, s.rows);
  torch::stable::parallel_for(0, t.chunks() * spans, 1, [&](int64_t begin, int64_t end) {
    const Tensor scratch =
        new_tensor(x, {made.scratch(ceil_divide(s.rows, spans))}, x.scalar_type());
    for (int64_t i = begin; i < end; ++i) {
      const int64_t span = i % spans;
      made.run(i / spans, s.rows * span / spans, s.rows * (span + 1) / spans, data_of<A>(scratch));
    }
  });
}

}  // namespace

Tensor thin_convolution(const Tensor& x, const Tensor& w, const OptionalTensor& bias,
                        int64_t stride_y, int64_t stride_x, int64_t padding_y, int64_t padding_x,
                        int64_t dilation_y, int64_t dilation_x, bool counting,
                        const OptionalTensor& mask) {
  check_images(kOp, x);
  if (w.dim() != 4 || w.numel() == 0) {
    refuse(kOp, "w", "[O, C, height, width], none of them 0", describe(w));
  }
  const auto type = x.scalar_type();
  check_tensor(kOp, "w", w, type, {w.size(0), x.size(1), w.size(2), w.size(3)}, x);
  if (bias) check_tensor(kOp, "bias", *bias, type, {w.size(0)}, x);
  if (mask) {  // it is the gradient that reads it
    const int64_t words = words_of(w.numel() / w.size(0));
    check_tensor(kOp, "mask", *mask, ScalarType::Short, {1, w.size(0), words}, x);
  }
  const ThinShape s =
      check_thin(kOp, x, w.size(0), w.size(2), w.size(3),
                 {stride_y, stride_x, padding_y, padding_x, dilation_y, dilation_x});
  const Tensor y = new_tensor(x, {s.images, s.rows, s.y.out(), s.x.out()}, type);
  if (s.images == 0) return y;
  const Tensor from = torch::stable::contiguous(x), weight = torch::stable::contiguous(w);
  OptionalTensor shift;
  if (bias) shift = torch::stable::contiguous(*bias);
  if (type == ScalarType::Double) {
    convolve<double>(s, counting, from, weight, shift, y);
  } else {
    convolve<float>(s, counting, from, weight, shift, y);
  }
  return y;
}

}  // namespace pathprune
