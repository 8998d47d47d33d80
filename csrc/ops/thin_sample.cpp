// The gradient of a convolution by those of its weights that a mask keeps, on the CPU. The sums
// over all outputs are cut by the sizes alone and added in one order: the same bits for any number
// of threads.

#include "ops/thin_sample.h"

#include <algorithm>
#include <limits>
#include <vector>

#include "core/macros.h"
#include "glue/cpu.h"
#include "glue/cpu_ops.h"
#include "glue/thin_arguments.h"

namespace pathprune {
namespace {

constexpr const char* kOp = "thin_sample";
constexpr int64_t kMostNumbers = std::numeric_limits<int32_t>::max();
constexpr int64_t kParts = 8;                   // sums that are formed apart, then added
constexpr int64_t kOuterBytes = 1 << 20;        // of g laid out: what a second-level cache holds
constexpr int64_t kReadBytes = 28000;           // of x read by a tile: most of a first-level cache
constexpr int64_t kWidest = 64;                 // positions of a row laid out at once
constexpr int64_t kTile = 64, kTileWidth = 16;  // positions summed over at once, and in a row
constexpr int64_t kRun = 16;  // weights of a row that a tile should have, for loads of g to be few

// Equal parts of a whole, of at most so many.
int64_t equal_parts(int64_t whole, int64_t most) {
  return ceil_divide(whole, ceil_divide(whole, std::clamp<int64_t>(most, 1, whole)));
}

// How the sums over all outputs are cut. A lane has a band of the output rows of an image; of the
// bands in the lanes, some positions are laid out at a time, and of those some are summed over.
struct Tiling {
  Tiling(const ThinShape& s, int64_t rows, int64_t channels, int64_t entries, int64_t lane_count,
         int64_t bytes)
      : lanes(lane_count), bands(bands_of(s, lane_count)), band(ceil_divide(s.y.out(), bands)) {
    const int64_t most = std::max<int64_t>(16, kOuterBytes / (rows * lanes * bytes));
    width = equal_parts(s.x.out(), std::min(kWidest, most));
    height = equal_parts(band, most / width);
    tile_width = equal_parts(width, kTileWidth);
    tile_height = equal_parts(height, kTile / tile_width);
    down = ceil_divide(band, height);
    across = ceil_divide(s.x.out(), width);
    groups = ceil_divide(s.images * bands, lanes);
    wide = reads(s.x, width);
    // odd: channels do not fall onto each other in the cache
    x_plane = ((reads(s.y, height) * wide) | 1) * lanes;
    g_plane = height * width * lanes;
    const int64_t tile = reads(s.y, tile_height) * reads(s.x, tile_width) * lanes * bytes;
    const int64_t wanted = std::max(kReadBytes / tile, kRun * channels * rows / entries);
    block = std::max<int64_t>(1, std::min({wanted, channels, kMostNumbers / x_plane}));
  }

  // Positions that so many outputs read.
  static int64_t reads(const ThinAxis& a, int64_t outputs) {
    return (outputs - 1) * a.stride + a.span() + 1;
  }
  int64_t chunks() const { return groups * down * across; }

  int64_t lanes;
  int64_t bands, band;              // of an image; output rows of a band
  int64_t groups;                   // of as many bands as there are lanes
  int64_t height, width;            // positions that are laid out at once: a chunk
  int64_t down, across;             // so many times in a band
  int64_t wide;                     // columns that they read
  int64_t x_plane, g_plane;         // from a channel to the next, from a row
  int64_t tile_height, tile_width;  // positions that are summed over at once
  int64_t block;                    // channels at once

 private:
  // As few as fill the lanes about as well as any number.
  static int64_t bands_of(const ThinShape& s, int64_t lanes) {
    int64_t best = 1;
    const auto taken = [&](int64_t n) {
      return static_cast<double>(ceil_divide(s.images * n, lanes) * ceil_divide(s.y.out(), n));
    };
    for (int64_t n = 2; n <= std::min(lanes, s.y.out()); ++n) {
      if (taken(n) < 0.95 * taken(best)) best = n;
    }
    return best;
  }
};

// What the mask keeps, by blocks of channels. Rows and channels without any are left out.
class SampleWeights {
 public:
  SampleWeights(const uint16_t* mask, const ThinShape& s) : s_(s) {
    const int64_t columns = s.channels * s.kernel(), words = words_of(columns);
    const auto last = static_cast<uint16_t>(0xFFFF >> (words * kWordColumns - columns));
    std::vector<bool> live(s.channels);
    for (int64_t r = 0; r < s.rows; ++r, mask += words) {
      const auto begin = entries();
      for (int64_t i = 0; i < words; ++i) {
        const uint32_t word = i + 1 < words ? mask[i] : mask[i] & last;
        for (uint32_t bits = word; bits; bits &= bits - 1) {
          columns_.push_back(static_cast<int32_t>(i * kWordColumns + __builtin_ctz(bits)));
          live[columns_.back() / s.kernel()] = true;
        }
      }
      if (entries() == begin) continue;
      rows.push_back(r);
      row_begin_.push_back(begin);
    }
    row_begin_.push_back(entries());
    for (int64_t c = 0; c < s.channels; ++c) {
      if (live[c]) channels.push_back(c);
    }
  }

  int64_t entries() const { return static_cast<int64_t>(columns_.size()); }

  // Finds the runs of every block, with room for a group of sums behind its last one.
  void lay_out(const Tiling& t, int64_t group) {
    const auto shift = tap_shifts(t);
    std::vector<int32_t> place(s_.channels);  // of a channel in its block
    const auto live = static_cast<int64_t>(channels.size());
    for (int64_t i = 0; i < live; ++i) {
      place[channels[i]] = static_cast<int32_t>(i % t.block * t.x_plane);
    }
    shifts.reserve(entries() + ceil_divide(live, t.block) * group);
    targets.reserve(shifts.capacity());
    std::vector<int64_t> next(row_begin_.begin(), row_begin_.end() - 1);
    const auto kernel = static_cast<int32_t>(s_.kernel());
    for (int64_t first = 0; first < live; first += t.block) {
      const int64_t end = (channels[std::min(first + t.block, live) - 1] + 1) * kernel;
      block_begin.push_back(static_cast<int64_t>(runs.size()));
      for (size_t r = 0; r < rows.size(); ++r) {
        const auto begin = static_cast<int32_t>(shifts.size());
        for (; next[r] < row_begin_[r + 1] && columns_[next[r]] < end; ++next[r]) {
          const int32_t column = columns_[next[r]];
          shifts.push_back(place[column / kernel] + shift[column % kernel]);
          targets.push_back(rows[r] * s_.channels * kernel + column);
        }
        const auto stop = static_cast<int32_t>(shifts.size());
        if (stop > begin) runs.push_back({static_cast<int32_t>(r), begin, stop});
      }
      shifts.resize(shifts.size() + group, 0);
      targets.resize(shifts.size(), -1);
    }
    block_begin.push_back(static_cast<int64_t>(runs.size()));
  }

  int64_t blocks() const { return static_cast<int64_t>(block_begin.size()) - 1; }

  std::vector<int64_t> rows, channels;
  std::vector<int64_t> block_begin;  // among the runs
  std::vector<SampleRun> runs;
  std::vector<int32_t> shifts;   // of what an entry reads, from the first position of its block on
  std::vector<int64_t> targets;  // where the entry is in the weight; -1: no entry

 private:
  // Of the kernel's entries.
  std::vector<int32_t> tap_shifts(const Tiling& t) const {
    std::vector<int32_t> made;
    for (int64_t k = 0; k < s_.kernel(); ++k) {
      const int64_t y = k / s_.x.kernel * s_.y.dilation, x = k % s_.x.kernel * s_.x.dilation;
      made.push_back(static_cast<int32_t>((y * t.wide + x) * t.lanes));
    }
    return made;
  }

  const ThinShape& s_;
  std::vector<int32_t> columns_;  // of the entries, row by row
  std::vector<int64_t> row_begin_;
};

// A window into planes of images, one plane for each lane.
template <typename A>
struct Window {
  const A* plane[kMostSampleLanes];  // null: zeros
  int64_t first[kMostSampleLanes];   // row of the window
  int64_t end[kMostSampleLanes];     // of the plane's rows
  int64_t column, columns;           // the window's first; so many has a plane

  const A* at(int64_t lane, int64_t row, int64_t from) const {
    const int64_t y = first[lane] + row;
    const bool inside = plane[lane] && y >= 0 && y < end[lane];
    return inside ? plane[lane] + y * columns + from : nullptr;
  }
  bool is_level(int64_t lanes) const {
    for (int64_t l = 1; l < lanes; ++l) {
      if (first[l] != first[0] || end[l] != end[0]) return false;
    }
    return true;
  }
};

// Lays a window out, with zeros where it goes beyond the planes.
template <typename A>
void lay(const SampleKernels<A>& kernels, const Window<A>& w, int64_t height, int64_t width,
         int64_t pitch, A* to) {
  const int64_t lanes = kernels.lanes;
  const int64_t left = std::clamp<int64_t>(-w.column, 0, width);
  const int64_t right = std::clamp<int64_t>(w.columns - w.column, left, width);
  const A* from[kMostSampleLanes];
  // Rows follow one another in memory where the planes are as wide as the window.
  const bool is_whole = right - left == w.columns && w.is_level(lanes);
  const int64_t top = is_whole ? std::clamp<int64_t>(-w.first[0], 0, height) : 0;
  const int64_t end = is_whole ? std::clamp<int64_t>(w.end[0] - w.first[0], top, height) : height;
  for (int64_t y = 0; y < height; ++y) {
    A* const row = to + y * pitch;
    const bool is_inside = y >= top && y < end && right > left;
    std::fill_n(row, (is_inside ? left : width) * lanes, A(0));
    if (!is_inside) continue;
    std::fill_n(row + right * lanes, (width - right) * lanes, A(0));
    if (is_whole && y > top) continue;
    const int64_t count = (is_whole ? end - top : 1) * (right - left);
    for (int64_t l = 0; l < lanes; ++l) from[l] = w.at(l, y, w.column + left);
    kernels.lay(from, count, right - left, pitch, row + left * lanes);
  }
}

template <typename A>
class Sample {
 public:
  Sample(const ThinShape& s, const SampleWeights& w, const Tiling& t,
         const SampleKernels<A>& kernels, const A* x, const A* g)
      : s_(s), w_(w), t_(t), kernels_(kernels), x_(x), g_(g) {}

  int64_t scratch() const { return g_size() + t_.block * t_.x_plane; }

  // Adds what a chunk of the outputs has for the entries of some blocks.
  void add(int64_t chunk, int64_t first_block, int64_t end_block, A* scratch, A* sums) const {
    const int64_t top = chunk / t_.across % t_.down * t_.height;
    const int64_t left = chunk % t_.across * t_.width;
    const Chunk c = {chunk / (t_.down * t_.across), top, left, std::min(t_.height, t_.band - top),
                     std::min(t_.width, s_.x.out() - left)};
    A* const x = scratch + g_size();
    lay_g(c, scratch);
    for (int64_t b = first_block; b < end_block; ++b) {
      lay_x(c, b, x);
      add_tiles(c, b, x, scratch, sums);
    }
  }

 private:
  // Positions of the bands of a group.
  struct Chunk {
    int64_t group, top, left, height, width;
  };

  int64_t g_size() const { return static_cast<int64_t>(w_.rows.size()) * t_.g_plane; }

  void add_tiles(const Chunk& c, int64_t block, const A* x, const A* g, A* sums) const {
    const int64_t x_step = t_.lanes * s_.x.stride, x_pitch = t_.wide * t_.lanes * s_.y.stride;
    const int64_t g_pitch = t_.width * t_.lanes;
    const int64_t begin = w_.block_begin[block], count = w_.block_begin[block + 1] - begin;
    for (int64_t i = 0; i < c.height; i += t_.tile_height) {
      for (int64_t j = 0; j < c.width; j += t_.tile_width) {
        const SampleTile<A> tile = {x + i * x_pitch + j * x_step,
                                    g + i * g_pitch + j * t_.lanes,
                                    t_.g_plane,
                                    std::min(t_.tile_height, c.height - i),
                                    std::min(t_.tile_width, c.width - j),
                                    x_pitch,
                                    x_step,
                                    g_pitch};
        kernels_.add(w_.runs.data() + begin, count, w_.shifts.data(), tile, sums);
      }
    }
  }

  // What a lane has: an image, or none, and the first output row of its band.
  struct Lane {
    bool is_filled;
    int64_t image, band;
  };
  Lane lane(const Chunk& c, int64_t l) const {
    const int64_t at = c.group * t_.lanes + l;
    return {at / t_.bands < s_.images, at / t_.bands, at % t_.bands * t_.band};
  }

  void lay_g(const Chunk& c, A* to) const {
    Window<A> window = {};
    window.column = c.left;
    window.columns = s_.x.out();
    for (const int64_t row : w_.rows) {
      for (int64_t l = 0; l < t_.lanes; ++l) {
        const auto [is_filled, image, band] = lane(c, l);
        window.plane[l] = is_filled ? g_ + (image * s_.rows + row) * s_.plane() : nullptr;
        window.first[l] = band + c.top;
        window.end[l] = std::min(band + t_.band, s_.y.out());
      }
      lay(kernels_, window, c.height, c.width, t_.width * t_.lanes, to);
      to += t_.g_plane;
    }
  }

  void lay_x(const Chunk& c, int64_t block, A* to) const {
    const auto live = static_cast<int64_t>(w_.channels.size());
    const int64_t plane = s_.y.size * s_.x.size;
    Window<A> window = {};
    window.column = c.left * s_.x.stride - s_.x.padding;
    window.columns = s_.x.size;
    for (int64_t i = block * t_.block; i < std::min(live, (block + 1) * t_.block); ++i) {
      for (int64_t l = 0; l < t_.lanes; ++l) {
        const auto [is_filled, image, band] = lane(c, l);
        const int64_t at = image * s_.channels + w_.channels[i];
        window.plane[l] = is_filled ? x_ + at * plane : nullptr;
        window.first[l] = (band + c.top) * s_.y.stride - s_.y.padding;
        window.end[l] = s_.y.size;
      }
      lay(kernels_, window, Tiling::reads(s_.y, c.height), Tiling::reads(s_.x, c.width),
          t_.wide * t_.lanes, to);
      to += t_.x_plane;
    }
  }

  const ThinShape& s_;
  const SampleWeights& w_;
  const Tiling& t_;
  const SampleKernels<A>& kernels_;
  const A *x_, *g_;
};

// Every chunk is of one part. The blocks of a part may go to several threads: no sum is in two.
template <typename A>
std::vector<A> sum_parts(const Sample<A>& work, int64_t chunks, int64_t parts, int64_t blocks,
                         int64_t stored, const Tensor& like) {
  std::vector<A> sums(parts * stored);
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t spans = std::clamp<int64_t>(ceil_divide(threads, parts), 1, blocks);
  torch::stable::parallel_for(0, parts * spans, 1, [&](int64_t begin, int64_t end) {
    const Tensor scratch = new_tensor(like, {work.scratch()}, like.scalar_type());
    for (int64_t i = begin; i < end; ++i) {
      const int64_t part = i / spans, span = i % spans;
      for (int64_t c = chunks * part / parts; c < chunks * (part + 1) / parts; ++c) {
        work.add(c, blocks * span / spans, blocks * (span + 1) / spans, data_of<A>(scratch),
                 sums.data() + part * stored);
      }
    }
  });
  return sums;
}

template <typename A>
void sample(const ThinShape& s, const Tensor& x, const Tensor& g, const Tensor& mask,
            const Tensor& made) {
  const auto kernels = PP_BY_ISA(sample_kernels<A>)();
  SampleWeights w(static_cast<const uint16_t*>(mask.const_data_ptr()), s);
  if (w.entries() == 0) return;
  const Tiling t(s, w.rows.size(), w.channels.size(), w.entries(), kernels.lanes, sizeof(A));
  if (t.x_plane > kMostNumbers) {
    refuse(kOp, "x", "less than 2^31 numbers in the rows that a kernel reads", describe(x));
  }
  w.lay_out(t, kernels.group);
  const Sample<A> work(s, w, t, kernels, static_cast<const A*>(x.const_data_ptr()),
                       static_cast<const A*>(g.const_data_ptr()));
  const int64_t parts = std::min(t.chunks(), kParts);
  const auto stored = static_cast<int64_t>(w.shifts.size());
  const auto sums = sum_parts<A>(work, t.chunks(), parts, w.blocks(), stored, x);
  A* const to = data_of<A>(made);
  torch::stable::parallel_for(0, stored, 1 << 14, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      if (w.targets[i] < 0) continue;
      A sum = 0;
      for (int64_t p = 0; p < parts; ++p) sum += sums[p * stored + i];
      to[w.targets[i]] = sum;
    }
  });
}

}  // namespace

Tensor thin_sample(const Tensor& x, const Tensor& g, const Tensor& mask, int64_t kernel_y,
                   int64_t kernel_x, int64_t stride_y, int64_t stride_x, int64_t padding_y,
                   int64_t padding_x, int64_t dilation_y, int64_t dilation_x) {
  check_images(kOp, x);
  check_at_least(kOp, "kernel_y", kernel_y, 1);
  check_at_least(kOp, "kernel_x", kernel_x, 1);
  if (g.dim() != 4) refuse(kOp, "g", "[N, O, H', W']", describe(g));
  const ThinShape s =
      check_thin(kOp, x, g.size(1), kernel_y, kernel_x,
                 {stride_y, stride_x, padding_y, padding_x, dilation_y, dilation_x});
  const auto type = x.scalar_type();
  check_tensor(kOp, "g", g, type, {s.images, s.rows, s.y.out(), s.x.out()}, x);
  check_tensor(kOp, "mask", mask, ScalarType::Short, {1, s.rows, words_of(s.channels * s.kernel())},
               x);
  if (s.rows * s.channels * s.kernel() > kMostNumbers) {
    refuse(kOp, "mask", "less than 2^31 weights", describe(mask));
  }
  const Tensor made = torch::stable::new_zeros(x, {s.rows, s.channels, s.y.kernel, s.x.kernel});
  if (x.numel() == 0 || g.numel() == 0) return made;
  const Tensor images = torch::stable::contiguous(x), outer = torch::stable::contiguous(g);
  const Tensor bits = torch::stable::contiguous(mask);
  if (type == ScalarType::Double) {
    sample<double>(s, images, outer, bits, made);
  } else {
    sample<float>(s, images, outer, bits, made);
  }
  return made;
}

}  // namespace pathprune
