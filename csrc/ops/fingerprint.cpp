#include "ops/fingerprint.h"

#include <atomic>

#include "core/fingerprint.h"
#include "glue/cpu.h"
#include "glue/cpu_ops.h"

namespace pathprune {

Tensor fingerprint(const Tensor& tensor) {
  const Tensor whole = torch::stable::contiguous(tensor);
  const Tensor found = new_tensor(tensor, {}, ScalarType::Long);
  const auto* bytes = static_cast<const uint8_t*>(whole.const_data_ptr());
  const int64_t size = whole.numel() * static_cast<int64_t>(whole.element_size());
  const int64_t words = size / 8, rest = size % 8;
  std::atomic<uint64_t> sum = 0;  // of integers: the same in any order
  torch::stable::parallel_for(0, words, kBlockWeights, [&](int64_t begin, int64_t end) {
    sum += PP_BY_ISA(fingerprint_of_words)(bytes + 8 * begin, end - begin, begin);
  });
  if (rest > 0) sum += fingerprint_of_word(word_of_bytes(bytes + 8 * words, rest), words);
  *data_of<int64_t>(found) = static_cast<int64_t>(sum.load());
  return found;
}

}  // namespace pathprune
