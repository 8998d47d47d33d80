// How the positions of a convolution are cut, and images laid into the lanes.

#pragma once

#include <algorithm>
#include <limits>
#include <utility>

#include "core/macros.h"
#include "ops/thin_lanes.h"
#include "ops/thin_shape.h"

namespace pathprune {

inline constexpr int64_t kMostThinNumbers = std::numeric_limits<int32_t>::max();

// Equal parts of a whole, of at most so many.
inline int64_t equal_parts(int64_t whole, int64_t most) {
  return ceil_divide(whole, ceil_divide(whole, std::clamp<int64_t>(most, 1, whole)));
}

// What is left of a weight: rows and channels with entries, and how many entries.
struct ThinLeft {
  int64_t rows, channels, entries;
};

// A tile's first position: where it is among the images laid out, and among outputs.
struct ThinPlace {
  int64_t x, outer;
  int64_t height, width;
};

// A lane has a band of the output rows of an image; of the bands in the lanes, some positions are
// laid out at a time, a chunk, and of those a tile is worked on, for a block of channels.
struct ThinTiling {
  ThinTiling(const ThinShape& s, const ThinLeft& left, const ThinTileSize& tile, int64_t lane_count,
             int64_t bytes)
      : shape(s),
        lanes(lane_count),
        bands(bands_of(s, lane_count)),
        band(ceil_divide(s.y.out(), bands)) {
    const int64_t most = std::max<int64_t>(16, kOuterBytes / (left.rows * lanes * bytes));
    width = equal_parts(s.x.out(), std::min(kWidest, most));
    height = equal_parts(band, most / width);
    tile_width = equal_parts(width, tile.width);
    tile_height = equal_parts(height, std::min(tile.height, tile.positions / tile_width));
    down = ceil_divide(band, height);
    across = ceil_divide(s.x.out(), width);
    groups = ceil_divide(s.images * bands, lanes);
    wide = reads(s.x, width);
    // odd: channels do not fall onto each other in the cache
    x_plane = ((reads(s.y, height) * wide) | 1) * lanes;
    x_step = lanes * s.x.stride;
    x_pitch = wide * lanes * s.y.stride;
    outer_pitch = width * lanes;
    outer_plane = height * outer_pitch;
    const int64_t read = reads(s.y, tile_height) * reads(s.x, tile_width) * lanes * bytes;
    const int64_t wanted = std::max(
        kReadBytes / read, kRun * left.channels * left.rows / std::max<int64_t>(1, left.entries));
    block = std::clamp<int64_t>(std::min(wanted, kMostThinNumbers / x_plane), 1,
                                std::max<int64_t>(1, left.channels));
    blocks = std::max<int64_t>(1, ceil_divide(left.channels, block));
  }

  // Positions of the bands of a group.
  struct Chunk {
    int64_t group, top, left, height, width;
  };
  int64_t chunks() const { return groups * down * across; }
  Chunk chunk(int64_t i) const {
    const int64_t top = i / across % down * height, left = i % across * width;
    return {i / (down * across), top, left, std::min(height, band - top),
            std::min(width, shape.x.out() - left)};
  }

  template <typename Visit>
  void for_each_tile(const Chunk& c, const Visit& visit) const {
    for (int64_t i = 0; i < c.height; i += tile_height) {
      for (int64_t j = 0; j < c.width; j += tile_width) {
        visit(ThinPlace{i * x_pitch + j * x_step, i * outer_pitch + j * lanes,
                        std::min(tile_height, c.height - i), std::min(tile_width, c.width - j)});
      }
    }
  }

  // What a lane has: an image, or none, and the first output row of its band and that behind it.
  struct Lane {
    bool is_filled;
    int64_t image, first, end;
  };
  Lane lane(const Chunk& c, int64_t l) const {
    const int64_t at = c.group * lanes + l, first = at % bands * band;
    return {at / bands < shape.images, at / bands, first, std::min(first + band, shape.y.out())};
  }

  // Positions that so many outputs read.
  static int64_t reads(const ThinAxis& a, int64_t outputs) {
    return (outputs - 1) * a.stride + a.span() + 1;
  }

  // From the first position that an output reads to that of a kernel's entry.
  int64_t shift(int64_t entry) const {
    const int64_t y = entry / shape.x.kernel * shape.y.dilation;
    return (y * wide + entry % shape.x.kernel * shape.x.dilation) * lanes;
  }

  const ThinShape& shape;
  int64_t lanes;
  int64_t bands, band;              // of an image; output rows of a band
  int64_t groups;                   // of as many bands as there are lanes
  int64_t height, width;            // of a chunk
  int64_t down, across;             // so many chunks in a band
  int64_t wide;                     // columns that a chunk reads
  int64_t x_plane, outer_plane;     // from a channel to the next, from a row of weights
  int64_t x_pitch, outer_pitch;     // from a position to the one below
  int64_t x_step;                   // and to the next; among outputs it is a vector
  int64_t tile_height, tile_width;  // positions that are worked on at once
  int64_t block, blocks;            // channels at once, and so often

 private:
  static constexpr int64_t kOuterBytes = 1 << 20;  // of outputs: what a second-level cache holds
  static constexpr int64_t kReadBytes = 28000;     // by a tile: most of a first-level cache
  static constexpr int64_t kWidest = 64;           // columns of a chunk
  static constexpr int64_t kRun = 16;  // weights of a row that a tile should have at least

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

// A window into planes of images, one plane for each lane.
template <typename A>
struct Window {
  const A* plane[kMostThinLanes];  // null: zeros
  int64_t first[kMostThinLanes];   // row of the window
  int64_t end[kMostThinLanes];     // of the plane's rows
  int64_t column, columns;         // the window's first; so many has a plane

  const A* at(int64_t lane, int64_t row, int64_t from) const {
    const int64_t y = first[lane] + row;
    const bool inside = plane[lane] && y >= 0 && y < end[lane];
    return inside ? plane[lane] + y * columns + from : nullptr;
  }
  // Rows of the window that all planes have.
  std::pair<int64_t, int64_t> common(int64_t lanes, int64_t height) const {
    int64_t top = 0, bottom = height;
    for (int64_t l = 0; l < lanes; ++l) {
      if (!plane[l]) continue;
      top = std::max(top, -first[l]);
      bottom = std::min(bottom, end[l] - first[l]);
    }
    return {top, bottom};
  }
};

// Lays a window out, with zeros where it goes beyond the planes.
template <typename A>
void lay(const LaneKernels<A>& kernels, const Window<A>& w, int64_t height, int64_t width,
         int64_t pitch, A* to) {
  const int64_t lanes = kernels.lanes;
  const int64_t left = std::clamp<int64_t>(-w.column, 0, width);
  const int64_t right = std::clamp<int64_t>(w.columns - w.column, left, width);
  const A* from[kMostThinLanes];
  const auto [top, bottom] = w.common(lanes, height);
  // Rows follow one another in memory where the planes are as wide as the window.
  const int64_t at_once = right - left == w.columns ? bottom - top : 1;
  for (int64_t y = 0; y < height; ++y) {
    A* const row = to + y * pitch;
    std::fill_n(row, left * lanes, A(0));
    std::fill_n(row + right * lanes, (width - right) * lanes, A(0));
    if (right == left || (at_once > 1 && y > top && y < bottom)) continue;
    const int64_t count = (y == top ? std::max<int64_t>(1, at_once) : 1) * (right - left);
    for (int64_t l = 0; l < lanes; ++l) from[l] = w.at(l, y, w.column + left);
    kernels.lay(from, count, right - left, pitch, row + left * lanes);
  }
}

// Lays out what a chunk reads of channels.
template <typename A>
void lay_channels(const LaneKernels<A>& kernels, const ThinTiling& t, const ThinTiling::Chunk& c,
                  const A* x, const int64_t* channels, int64_t count, A* to) {
  const ThinShape& s = t.shape;
  Window<A> window = {};
  window.column = c.left * s.x.stride - s.x.padding;
  window.columns = s.x.size;
  for (int64_t i = 0; i < count; ++i, to += t.x_plane) {
    for (int64_t l = 0; l < t.lanes; ++l) {
      const auto lane = t.lane(c, l);
      const int64_t at = lane.image * s.channels + channels[i];
      window.plane[l] = lane.is_filled ? x + at * s.y.size * s.x.size : nullptr;
      window.first[l] = (lane.first + c.top) * s.y.stride - s.y.padding;
      window.end[l] = s.y.size;
    }
    lay(kernels, window, ThinTiling::reads(s.y, c.height), ThinTiling::reads(s.x, c.width),
        t.wide * t.lanes, to);
  }
}

}  // namespace pathprune
