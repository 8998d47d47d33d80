#include "glue/cpu.h"

#include <cstring>

namespace pathprune {

Tensor padded_flow(const Tensor& flow, int64_t positions, int64_t width) {
  const int64_t groups = flow.size(0), given = flow.size(1), units = flow.size(2);
  if (given == positions && units == width) return flow;
  const Tensor padded = torch::stable::new_zeros(flow, {groups, positions, width});
  if (flow.numel() == 0) return padded;
  const size_t bytes = flow.element_size();
  const char* from = static_cast<const char*>(flow.const_data_ptr());
  char* to = static_cast<char*>(padded.mutable_data_ptr());
  for (int64_t group = 0; group < groups; ++group) {
    for (int64_t t = 0; t < given; ++t) {
      std::memcpy(to + (group * positions + t) * width * bytes,
                  from + (group * given + t) * units * bytes, units * bytes);
    }
  }
  return padded;
}

}  // namespace pathprune
