// The exact k-th largest of an array.

#pragma once

#include <algorithm>
#include <cstdint>
#include <functional>
#include <vector>

#include "core/float_key.h"

namespace pathprune {

// The k-th largest (1-based, 1 <= k <= count) by float_key; a NaN counts as the largest of all.
// One read of the values fills a histogram, a second collects the one bin that matters.
template <typename T>
T kth_largest(const T* values, int64_t count, int64_t k) {
  using Key = FloatKey<T>;
  constexpr int64_t kSmall = 1 << 15;  // below this the histogram costs more than it saves
  std::vector<Key> keys;
  if (count <= kSmall) {
    keys.resize(count);
    std::transform(values, values + count, keys.begin(), [](T value) { return float_key(value); });
  } else {
    std::vector<int64_t> histogram(int64_t{1} << FloatTraits<T>::kBinBits);
    for (int64_t i = 0; i < count; ++i) ++histogram[float_bin(values[i])];
    int64_t bin = static_cast<int64_t>(histogram.size()) - 1;
    for (; histogram[bin] < k; --bin) k -= histogram[bin];
    keys.reserve(histogram[bin]);
    for (int64_t i = 0; i < count; ++i) {
      if (float_bin(values[i]) == bin) keys.push_back(float_key(values[i]));
    }
  }
  std::nth_element(keys.begin(), keys.begin() + (k - 1), keys.end(), std::greater<Key>());
  return float_of_key<T>(keys[k - 1]);
}

}  // namespace pathprune
