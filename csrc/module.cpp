// `_C`: build facts, and the torch-free core for numpy, so that tests and curious people reach it.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <string_view>
#include <vector>

#include "core/bits.h"
#include "core/fixed_cdf.h"
#include "core/float_key.h"
#include "core/isa.h"
#include "core/natural_log.h"
#include "core/philox.h"
#include "core/select.h"

namespace py = pybind11;

namespace pathprune {
namespace {

// Contiguous input; another layout is copied, another type is refused by ``.
template <typename T>
using Array = py::array_t<T, py::array::c_style>;
using Bools = Array<bool>;

void require(bool holds, const std::string& message) {
  if (!holds) throw py::value_error(message);
}

const uint8_t* bytes_of(const Bools& bools) {
  return reinterpret_cast<const uint8_t*>(bools.data());
}

// An array of `function` of every element, of the same shape.
template <typename To, typename From, typename Function>
Array<To> map(const Array<From>& input, Function function) {
  Array<To> output(std::vector<py::ssize_t>(input.shape(), input.shape() + input.ndim()));
  std::transform(input.data(), input.data() + input.size(), output.mutable_data(), function);
  return output;
}

// ---- build facts ----------------------------------------------------------------------------

std::vector<std::string> split(std::string_view list) {
  std::vector<std::string> items;
  while (!list.empty()) {
    const size_t comma = std::min(list.find(','), list.size());
    items.emplace_back(list.substr(0, comma));
    list.remove_prefix(std::min(comma + 1, list.size()));
  }
  return items;
}

py::dict build_info() {
  const std::string_view nvcc = PATHPRUNE_NVCC_VERSION;
  py::dict info;
  info["version"] = PATHPRUNE_VERSION;
  info["git_revision"] = PATHPRUNE_GIT_REVISION;
  info["torch_target_version"] = static_cast<uint64_t>(PATHPRUNE_TORCH_TARGET);
  info["cuda_architectures"] = split(PATHPRUNE_CUDA_ARCHITECTURES);
  info["nvcc_version"] = nvcc.empty() ? py::object(py::none()) : py::str(nvcc);
  info["isas"] = split(PATHPRUNE_ISAS);
  info["isa"] = isa_name(chosen_isa());
  info["compiler"] = PATHPRUNE_COMPILER;
  info["sanitized"] = PATHPRUNE_SANITIZE != 0;
  return info;
}

// ---- philox ---------------------------------------------------------------------------------

Array<uint32_t> philox_words(uint64_t seed, const Array<uint64_t>& low, uint64_t high) {
  Array<uint32_t> words(std::vector<py::ssize_t>{low.size(), 4});
  for (py::ssize_t i = 0; i < low.size(); ++i) {
    const PhiloxBlock block = philox(seed, low.data()[i], high);
    std::copy(block.word, block.word + 4, words.mutable_data() + 4 * i);
  }
  return words;
}

Array<double> philox_uniform53(uint64_t seed, const Array<uint64_t>& low, uint64_t high) {
  return map<double>(low, [&](uint64_t counter) { return uniform53(philox(seed, counter, high)); });
}

// The uniform number of two given words, for the ends of its range.
double uniform53_of_words(uint32_t word0, uint32_t word1) {
  return uniform53(PhiloxBlock{{word0, word1, 0, 0}});
}

Array<double> natural_log_of(const Array<double>& numbers) {
  return map<double>(numbers, [](double number) {
    require(number > 0 && std::isfinite(number), "natural_log: numbers: wanted finite ones > 0");
    return natural_log(number);
  });
}

// ---- fixed-point distributions --------------------------------------------------------------

py::tuple fixed_cdf(const Array<double>& weights) {
  require(weights.ndim() == 1,
          "fixed_cdf: weights: wanted one dimension, got " + std::to_string(weights.ndim()));
  const std::span<const double> row(weights.data(), static_cast<size_t>(weights.size()));
  require(are_fixed_weights(row), "fixed_cdf: weights: wanted finite numbers >= 0, got others");
  Array<uint64_t> cdf(weights.size());
  const FixedRow fixed = make_fixed_row(row);
  const int64_t lost = fill_cdf(row, fixed, cdf.mutable_data());
  return py::make_tuple(cdf, fixed.uniform ? py::object(py::none()) : py::int_(fixed.scale), lost);
}

Array<int64_t> fixed_cdf_draw(const Array<uint64_t>& cdf, const Array<uint64_t>& words) {
  const py::ssize_t count = cdf.size();
  require(cdf.ndim() == 1 && count > 0,
          "fixed_cdf_draw: cdf: wanted one dimension with at least one entry, got " +
              std::to_string(count) + " entries in " + std::to_string(cdf.ndim()) + " dimensions");
  const uint64_t total = cdf.data()[count - 1];
  require(total > 0, "fixed_cdf_draw: cdf: wanted a total > 0, got 0");
  return map<int64_t>(words, [&](uint64_t word) {
    return find_in_cdf(cdf.data(), count, fixed_draw(word, total));
  });
}

// ---- float keys, selection ------------------------------------------------------------------

template <typename T>
void define_floats(py::module_& m, const std::string& suffix) {
  using Key = FloatKey<T>;
  m.def(
      "float_key",
      [](const Array<T>& values) {
        return map<Key>(values, [](T value) { return float_key(value); });
      },
      py::arg("values"), "Order-preserving integer keys; NaN has the largest.");
  m.def(
      "float_of_key",
      [](const Array<Key>& keys) {
        return map<T>(keys, [](Key key) { return float_of_key<T>(key); });
      },
      py::arg("keys"), "The numbers whose keys these are.");
  m.def(
      "float_bin",
      [](const Array<T>& values) {
        return map<uint32_t>(values, [](T value) { return float_bin(value); });
      },
      py::arg("values"), "Histogram bins: the top 17 (float32) or 20 bits of the keys.");
  m.def(
      "kth_largest",
      [](const Array<T>& values, int64_t k) {
        require(1 <= k && k <= values.size(), "kth_largest: k: wanted 1 to " +
                                                  std::to_string(values.size()) + ", got " +
                                                  std::to_string(k));
        return kth_largest(values.data(), values.size(), k);
      },
      py::arg("values"), py::arg("k"), "The k-th largest, k = 1 being the largest.");
  m.def(("float_at_least_" + suffix).c_str(), float_at_least<T>, py::arg("mantissa"),
        py::arg("exponent") = 0, "The smallest number >= mantissa * 2**exponent, or inf.");
  m.def(("float_above_" + suffix).c_str(), float_above<T>, py::arg("mantissa"),
        py::arg("exponent") = 0, "The smallest number > mantissa * 2**exponent, or inf.");
}

// ---- bits -----------------------------------------------------------------------------------

Array<uint8_t> pack_bits_of(const Bools& bools) {
  Array<uint8_t> bytes(bytes_of_bits(bools.size()));
  pack_bits(bytes_of(bools), bools.size(), bytes.mutable_data());
  return bytes;
}

Bools unpack_bits_of(const Array<uint8_t>& bytes, int64_t count) {
  require(count >= 0 && bytes.size() == bytes_of_bits(count),
          "unpack_bits: bytes: wanted ceil(" + std::to_string(count) + " / 8), got " +
              std::to_string(bytes.size()));
  Bools bools(count);
  unpack_bits(bytes.data(), count, reinterpret_cast<uint8_t*>(bools.mutable_data()));
  return bools;
}

Array<int16_t> pack_rows(const Bools& bools) {
  require(bools.ndim() == 2,
          "pack_rows: bools: wanted two dimensions, got " + std::to_string(bools.ndim()));
  const int64_t columns = bools.shape(1);
  const int64_t words = words_of_columns(columns);
  Array<int16_t> packed(std::vector<py::ssize_t>{bools.shape(0), words});
  for (int64_t row = 0; row < bools.shape(0); ++row) {
    pack_row(bytes_of(bools) + row * columns, columns, packed.mutable_data() + row * words);
  }
  return packed;
}

Bools unpack_rows(const Array<int16_t>& packed, int64_t columns) {
  require(columns >= 0 && packed.ndim() == 2 && packed.shape(1) == words_of_columns(columns),
          "unpack_rows: words: wanted [rows, ceil(" + std::to_string(columns) + " / 16)]");
  const int64_t words = packed.shape(1);
  Bools bools(std::vector<py::ssize_t>{packed.shape(0), columns});
  uint8_t* bytes = reinterpret_cast<uint8_t*>(bools.mutable_data());
  for (int64_t row = 0; row < packed.shape(0); ++row) {
    unpack_row(packed.data() + row * words, columns, bytes + row * columns);
  }
  return bools;
}

int64_t count_bits_of(const py::array& array) {
  require(array.flags() & py::array::c_style, "count_bits: array: wanted contiguous, got strided");
  return count_bits(array.data(), array.nbytes());
}

}  // namespace
}  // namespace pathprune

PYBIND11_MODULE(_C, m) {
  using namespace pathprune;
  m.doc() = "Build facts, and pathprune's torch-free core on numpy arrays.";
  m.def("build_info", build_info, "What this binary was built from, with and for.");
  m.def("philox", philox_words, py::arg("seed"), py::arg("counter"), py::arg("counter_high") = 0,
        "uint32 [n, 4]: the Philox4x32-10 block of each 64-bit counter.");
  m.def("uniform53", philox_uniform53, py::arg("seed"), py::arg("counter"),
        py::arg("counter_high") = 0, "float64 in (0, 1), 53 random bits each, one per counter.");
  m.def("uniform53_of_words", uniform53_of_words, py::arg("word0"), py::arg("word1"),
        "The uniform number that two random words make.");
  m.def("natural_log", natural_log_of, py::arg("numbers"),
        "The natural logarithm of float64 numbers > 0, the same bits everywhere.");
  m.def("fixed_cdf", fixed_cdf, py::arg("weights"),
        "(uint64 inclusive prefix sums, scale or None where all weights are zero, number of\n"
        "non-zero weights that became 0): each weight becomes round(weight * 2**scale).");
  m.def(
      "fixed_cdf_draw", fixed_cdf_draw, py::arg("cdf"), py::arg("words"),
      "int64 indices: for each random uint64 word the smallest index whose CDF exceeds the draw.");
  define_floats<float>(m, "float32");
  define_floats<double>(m, "float64");
  m.def("pack_bits", pack_bits_of, py::arg("bools"),
        "bool [...] -> uint8 [ceil(n / 8)]; flat element i is bit i % 8 of byte i / 8.");
  m.def("unpack_bits", unpack_bits_of, py::arg("bytes"), py::arg("count"),
        "Its inverse: bool [count].");
  m.def("pack_rows", pack_rows, py::arg("bools"),
        "bool [rows, columns] -> int16 [rows, ceil(columns / 16)]; padding bits are zero.");
  m.def("unpack_rows", unpack_rows, py::arg("words"), py::arg("columns"),
        "Its inverse: bool [rows, columns].");
  m.def("count_bits", count_bits_of, py::arg("array"), "How many bits of an array are set.");
}
