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
#include "ops/thin_tiling.h"

namespace pathprune {
namespace {

constexpr const char* kOp = "thin_sample";
constexpr int64_t kParts = 8;  // sums that are formed apart, then added
constexpr ThinTileSize kTile = {64, 16, 64};

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
  ThinLeft left() const {
    return {static_cast<int64_t>(rows.size()), static_cast<int64_t>(channels.size()), entries()};
  }

  // Finds the runs of every block, with room for a group of sums behind its last one.
  void lay_out(const ThinTiling& t, int64_t group) {
    std::vector<int32_t> shift;  // of the kernel's entries
    for (int64_t k = 0; k < s_.kernel(); ++k) shift.push_back(static_cast<int32_t>(t.shift(k)));
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
  const ThinShape& s_;
  std::vector<int32_t> columns_;  // of the entries, row by row
  std::vector<int64_t> row_begin_;
};

template <typename A>
class Sample {
 public:
  using Chunk = ThinTiling::Chunk;

  Sample(const SampleWeights& w, const ThinTiling& t, const LaneKernels<A>& lanes,
         const SampleKernels<A>& kernels, const A* x, const A* g)
      : s_(t.shape), w_(w), t_(t), lanes_(lanes), kernels_(kernels), x_(x), g_(g) {}

  int64_t scratch() const { return g_size() + t_.block * t_.x_plane; }

  // Adds what a chunk of the outputs has for the entries of some blocks.
  void add(int64_t chunk, int64_t first_block, int64_t end_block, A* scratch, A* sums) const {
    const Chunk c = t_.chunk(chunk);
    const auto live = static_cast<int64_t>(w_.channels.size());
    A* const x = scratch + g_size();
    lay_g(c, scratch);
    for (int64_t b = first_block; b < end_block; ++b) {
      const int64_t first = b * t_.block, some = std::min(t_.block, live - first);
      lay_channels(lanes_, t_, c, x_, w_.channels.data() + first, some, x);
      add_tiles(c, b, x, scratch, sums);
    }
  }

 private:
  int64_t g_size() const { return static_cast<int64_t>(w_.rows.size()) * t_.outer_plane; }

  void add_tiles(const Chunk& c, int64_t block, const A* x, const A* g, A* sums) const {
    const int64_t begin = w_.block_begin[block], count = w_.block_begin[block + 1] - begin;
    t_.for_each_tile(c, [&](const ThinPlace& p) {
      const SampleTile<A> tile = {x + p.x, g + p.outer, t_.outer_plane, p.height,
                                  p.width, t_.x_pitch,  t_.x_step,      t_.outer_pitch};
      kernels_.add(w_.runs.data() + begin, count, w_.shifts.data(), tile, sums);
    });
  }

  void lay_g(const Chunk& c, A* to) const {
    Window<A> window = {};
    window.column = c.left;
    window.columns = s_.x.out();
    for (const int64_t row : w_.rows) {
      for (int64_t l = 0; l < t_.lanes; ++l) {
        const auto lane = t_.lane(c, l);
        const int64_t at = lane.image * s_.rows + row;
        window.plane[l] = lane.is_filled ? g_ + at * s_.plane() : nullptr;
        window.first[l] = lane.first + c.top;
        window.end[l] = lane.end;
      }
      lay(lanes_, window, c.height, c.width, t_.outer_pitch, to);
      to += t_.outer_plane;
    }
  }

  const ThinShape& s_;
  const SampleWeights& w_;
  const ThinTiling& t_;
  const LaneKernels<A>& lanes_;
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
  const auto lanes = PP_BY_ISA(lane_kernels<A>)();
  SampleWeights w(static_cast<const uint16_t*>(mask.const_data_ptr()), s);
  if (w.entries() == 0) return;
  const ThinTiling t(s, w.left(), kTile, lanes.lanes, sizeof(A));
  check_reads(kOp, x, t);
  w.lay_out(t, kernels.group);
  const Sample<A> work(w, t, lanes, kernels, static_cast<const A*>(x.const_data_ptr()),
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
  if (s.rows * s.channels * s.kernel() > kMostThinNumbers) {
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
