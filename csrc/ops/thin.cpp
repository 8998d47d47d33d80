// Convolutions by weights that are mostly zeros, on the CPU. Every sum is formed by one thread, in
// the order of the entries.

#include "ops/thin.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <utility>
#include <vector>

#include "core/macros.h"
#include "glue/cpu.h"
#include "glue/cpu_ops.h"
#include "glue/thin_arguments.h"

namespace pathprune {
namespace {

constexpr const char* kOp = "thin_convolution";
constexpr int64_t kChunkBytes = 1 << 19;  // of images laid flat: half of a second-level cache

// A few images, or some rows of the output of one, as they lie in a plane.
struct Layout {
  Layout(const ThinShape& s, int64_t planes, int64_t tile, int64_t bytes)
      : wide(s.x.period()), tall(s.y.period()) {
    const int64_t room = std::max<int64_t>(1, kChunkBytes / (planes * bytes * wide));  // rows
    images = std::clamp<int64_t>((room - s.y.reach()) / tall, 1, std::max<int64_t>(1, s.images));
    // fewer, where they fill tiles better
    const auto waste = [&](int64_t n) {
      const int64_t used = n * tall * wide;
      return static_cast<double>(ceil_divide(used, tile) * tile) / static_cast<double>(used);
    };
    for (int64_t n = images; n > images / 2 && n > 0; --n) {
      if (waste(n) < waste(images) - 0.01) images = n;
    }
    const int64_t least = ceil_divide(4 * tile, wide);
    const int64_t most = std::max({room - s.y.reach(), least, int64_t{1}});
    bands = images > 1 ? 1 : ceil_divide(s.y.out(), most);
    band = ceil_divide(s.y.out(), bands);
    const int64_t rows = (images - 1) * tall + band + s.y.reach();
    // an odd number of cache lines: planes do not fall onto each other in the cache
    const int64_t line = 64 / bytes;
    plane = (ceil_divide(rows * wide + s.x.reach(), line) | 1) * line;
  }

  int64_t wide, tall;   // from a row, or an image, to the next
  int64_t images;       // at once
  int64_t bands, band;  // of output rows, if it is one
  int64_t plane;        // from a channel to the next
};

// One channel of the images, every s-th row and column from these on.
struct Plane {
  int64_t channel, y, x;
};

// The weights without their zeros, and what of the images they read.
template <typename A>
class ThinWeights {
 public:
  ThinWeights(const A* w, const ThinShape& s, bool counting) : w_(w), s_(s), counting_(counting) {
    for (int64_t c = 0; c < s.channels; ++c) {
      bool read = false;
      for (int64_t r = 0; r < s.rows && !read; ++r) read = count(r, c) > 0;
      if (read) channels.push_back(c);
    }
    counts_.resize(s.rows);
    for (int64_t r = 0; r < s.rows; ++r) {
      for (const int64_t c : channels) counts_[r] += count(r, c);
    }
  }

  // What the live channels have for the kernel's entries.
  std::vector<Plane> planes() const {
    std::vector<Plane> found;
    for (const int64_t c : channels) {
      for (const auto& [y, x] : phases()) found.push_back({c, y, x});
    }
    return found;
  }

  void lay_out(const Layout& layout) {
    const auto parts = phases();
    const int64_t live = static_cast<int64_t>(channels.size()), all = live * s_.kernel();
    std::vector<int32_t> shift;
    shift.reserve(all);
    for (int64_t c = 0; c < live; ++c) {
      for (int64_t tap = 0; tap < s_.kernel(); ++tap) {
        const int64_t y = tap / s_.x.kernel, x = tap % s_.x.kernel;
        const std::pair phase{s_.y.phase(y), s_.x.phase(x)};
        const int64_t part = std::find(parts.begin(), parts.end(), phase) - parts.begin();
        const int64_t plane = c * static_cast<int64_t>(parts.size()) + part;
        shift.push_back(
            static_cast<int32_t>(plane * layout.plane + s_.y.row(y) * layout.wide + s_.x.row(x)));
      }
    }
    if (counting_) {
      whole = {0, 1, {}, 0, all, 0};
      shifts = shift;
      values.assign(all, A(1));
    }
    for (int64_t r = 0; r < s_.rows;) r += add(r, shift);
  }

  std::vector<int64_t> channels;
  std::vector<ThinRows> rows;
  ThinRows whole = {};
  std::vector<int32_t> shifts;
  std::vector<A> values;

 private:
  // The phases that the kernel reads, in the order of its entries.
  std::vector<std::pair<int64_t, int64_t>> phases() const {
    std::vector<std::pair<int64_t, int64_t>> found;
    for (int64_t y = 0; y < s_.y.kernel; ++y) {
      for (int64_t x = 0; x < s_.x.kernel; ++x) {
        const std::pair phase{s_.y.phase(y), s_.x.phase(x)};
        if (std::find(found.begin(), found.end(), phase) == found.end()) found.push_back(phase);
      }
    }
    return found;
  }

  const A* at(int64_t row, int64_t channel) const {
    return w_ + (row * s_.channels + channel) * s_.kernel();
  }
  int64_t count(int64_t row, int64_t channel) const {
    const A* from = at(row, channel);
    return std::count_if(from, from + s_.kernel(), [](A value) { return value != 0; });
  }
  bool lacks(int64_t row) const {
    return counting_ && 2 * counts_[row] > static_cast<int64_t>(channels.size()) * s_.kernel();
  }
  int64_t entries(int64_t row) const {
    return lacks(row) ? static_cast<int64_t>(channels.size()) * s_.kernel() - counts_[row]
                      : counts_[row];
  }

  // Adds this row, or this and the next; returns how many.
  int64_t add(int64_t row, const std::vector<int32_t>& shift) {
    const bool has_next = row + 1 < s_.rows;
    if (has_next && entries(row) + entries(row + 1) > kShared * in_either(row)) {
      append<2>(row, shift);
      return 2;
    }
    append<1>(row, shift);
    return 1;
  }

  int64_t in_either(int64_t row) const {
    const A less0 = lacks(row), less1 = lacks(row + 1);
    int64_t found = 0;
    for (const int64_t c : channels) {
      const A *a = at(row, c), *b = at(row + 1, c);
      for (int64_t k = 0; k < s_.kernel(); ++k) found += (a[k] != less0) | (b[k] != less1);
    }
    return found;
  }

  template <int kRows>
  void append(int64_t row, const std::vector<int32_t>& shift) {
    const auto begin = static_cast<int64_t>(shifts.size());
    ThinRows made = {row, kRows, {}, begin, begin, static_cast<int64_t>(values.size())};
    A less[kRows];
    for (int r = 0; r < kRows; ++r) {
      made.lacks[r] = lacks(row + r);
      less[r] = made.lacks[r];
    }
    // without a branch: every entry is written, and the next over it if it was zero
    shifts.resize(begin + shift.size() + 1);
    values.resize(made.values_begin + kRows * (shift.size() + 1));
    int32_t* to = shifts.data() + begin;
    A* value = values.data() + made.values_begin;
    const int32_t* from = shift.data();
    for (const int64_t c : channels) {
      for (int64_t k = 0; k < s_.kernel(); ++k) {
        bool any = false;
        *to = *from++;
        for (int r = 0; r < kRows; ++r) {
          value[r] = at(row + r, c)[k] - less[r];
          any |= value[r] != 0;
        }
        to += any;
        value += any ? kRows : 0;
      }
    }
    made.end = to - shifts.data();
    shifts.resize(made.end);
    values.resize(made.values_begin + kRows * (made.end - begin));
    rows.push_back(made);
  }

  // Two rows at once take so many times as long for an entry as one row for one.
  static constexpr double kShared = 1.2;

  const A* w_;
  const ThinShape& s_;
  bool counting_;
  std::vector<int64_t> counts_;
};

template <typename A>
class Convolution {
 public:
  Convolution(const ThinShape& s, const ThinWeights<A>& w, const Layout& layout,
              const ThinKernels<A>& kernels, const A* x, const A* bias, A* y)
      : s_(s),
        w_(w),
        planes_(w.planes()),
        layout_(layout),
        kernels_(kernels),
        x_(x),
        bias_(bias),
        y_(y) {}

  int64_t chunks() const { return ceil_divide(s_.images, layout_.images) * layout_.bands; }
  int64_t scratch() const {
    return static_cast<int64_t>(planes_.size()) * layout_.plane + kernels_.tile;
  }

  // A chunk: images from `first` on, and of them the output rows from `top` on.
  void run(int64_t chunk, A* flat, std::vector<ThinSegment>& segments, A* whole) const {
    const int64_t first = chunk / layout_.bands * layout_.images;
    const int64_t top = chunk % layout_.bands * layout_.band;
    const int64_t images = std::min(layout_.images, s_.images - first);
    const int64_t band = std::min(layout_.band, s_.y.out() - top);
    const int64_t rows = (images - 1) * layout_.tall + band;
    for (size_t i = 0; i < planes_.size(); ++i) {
      lay_flat(planes_[i], first, images, top, rows + s_.y.reach(), flat + i * layout_.plane);
    }
    for (int64_t from = 0; from < rows * layout_.wide; from += kernels_.tile) {
      ThinTile<A> tile = {w_.shifts.data(), w_.values.data(),
                          flat + from,      whole,
                          nullptr,          std::min(kernels_.tile, rows * layout_.wide - from)};
      if (w_.whole.count) {
        const ThinSegment all = {0, static_cast<int32_t>(tile.positions), 0};
        tile.segments = &all;
        tile.segment_count = 1;
        tile.y = whole;
        kernels_.multiply(&w_.whole, 1, tile);
      }
      cut(from, tile.positions, top, segments);
      tile.bias = bias_;
      tile.segments = segments.data();
      tile.segment_count = static_cast<int64_t>(segments.size());
      tile.plane = s_.plane();
      tile.y = y_ + first * s_.rows * tile.plane;
      kernels_.multiply(w_.rows.data(), static_cast<int64_t>(w_.rows.size()), tile);
    }
  }

 private:
  // A plane of some images, with zeros around.
  void lay_flat(const Plane& plane, int64_t first, int64_t images, int64_t top, int64_t rows,
                A* to) const {
    const int64_t before = s_.x.before();
    const int64_t length = ceil_divide(s_.x.size - plane.x, s_.x.stride);
    const int64_t height = ceil_divide(s_.y.size - plane.y, s_.y.stride);
    int64_t image = 0, row = top - s_.y.before();
    for (int64_t j = 0; j < rows; ++j, ++row, to += layout_.wide) {
      if (row == layout_.tall) {
        row = 0;
        ++image;
      }
      if (row < 0 || row >= height || image >= images) {
        std::fill_n(to, layout_.wide, A(0));
        continue;
      }
      const int64_t of = (first + image) * s_.channels + plane.channel;
      const A* from = x_ + (of * s_.y.size + row * s_.y.stride + plane.y) * s_.x.size + plane.x;
      for (int64_t i = 0; i < before; ++i) to[i] = 0;
      if (s_.x.stride == 1) {
        std::memcpy(to + before, from, length * sizeof(A));
      } else if (s_.x.stride == 2) {  // known to the compiler
        for (int64_t i = 0; i < length; ++i) to[before + i] = from[2 * i];
      } else {
        for (int64_t i = 0; i < length; ++i) to[before + i] = from[i * s_.x.stride];
      }
      for (int64_t i = before + length; i < layout_.wide; ++i) to[i] = 0;
    }
    std::fill_n(to, s_.x.reach(), A(0));
  }

  // The parts of a tile that are outputs.
  void cut(int64_t from, int64_t count, int64_t top, std::vector<ThinSegment>& segments) const {
    segments.clear();
    for (int64_t t = from; t < from + count;) {
      const int64_t row = t / layout_.wide, x = t % layout_.wide;
      const int64_t v = top + row, image = v / layout_.tall, y = v % layout_.tall;
      const int64_t until = std::min(from + count, (row + 1) * layout_.wide);
      if (y < s_.y.out() && x < s_.x.out()) {
        const int64_t to = (image * s_.rows * s_.y.out() + y) * s_.x.out() + x;
        const int64_t length = std::min(until - t, s_.x.out() - x);
        segments.push_back({static_cast<int32_t>(t - from), static_cast<int32_t>(length), to});
      }
      t = until;
    }
  }

  const ThinShape& s_;
  const ThinWeights<A>& w_;
  const std::vector<Plane> planes_;
  const Layout& layout_;
  const ThinKernels<A>& kernels_;
  const A *x_, *bias_;
  A* y_;
};

template <typename A>
void convolve(const ThinShape& s, bool counting, const Tensor& x, const Tensor& w,
              const OptionalTensor& bias, const Tensor& y) {
  const auto kernels = PP_BY_ISA(thin_kernels<A>)();
  ThinWeights<A> weights(static_cast<const A*>(w.const_data_ptr()), s, counting);
  const auto planes = std::max<int64_t>(1, static_cast<int64_t>(weights.planes().size()));
  const Layout layout(s, planes, kernels.tile, sizeof(A));
  if (planes * layout.plane > std::numeric_limits<int32_t>::max()) {
    refuse(kOp, "x", "less than 2^31 numbers in the rows that a kernel reads", describe(x));
  }
  weights.lay_out(layout);
  const Convolution<A> made(s, weights, layout, kernels, static_cast<const A*>(x.const_data_ptr()),
                            data_or_null<A>(bias), data_of<A>(y));
  torch::stable::parallel_for(0, made.chunks(), 1, [&](int64_t begin, int64_t end) {
    const Tensor flat = new_tensor(x, {made.scratch()}, x.scalar_type());
    std::vector<A> whole(kernels.tile);
    std::vector<ThinSegment> segments;
    for (int64_t i = begin; i < end; ++i) made.run(i, data_of<A>(flat), segments, whole.data());
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
