// Which instruction set the CPU kernels use. Every csrc/ops/*_isa.cpp is compiled once for each,
// with PATHPRUNE_ISA defined as its name, and puts what it defines into a namespace of that name:
//
//     // sweep.h, inside pathprune
//     PP_IN_EVERY_ISA(void sweep(const float* w, ...);)
//     // sweep_isa.cpp
//     namespace pathprune::PATHPRUNE_ISA { void sweep(const float* w, ...) { ... } }
//     // sweep.cpp
//     PP_BY_ISA(sweep)(w, ...);
//
// Such a file keeps every function it uses inline within it or in that namespace: an inline
// function of another namespace that the compiler emits out of line could be linked from the
// AVX-512 object and then run on a processor without it. tests/test_build.py looks for such
// functions.

#pragma once

#include <cstdlib>
#include <string_view>

namespace pathprune {

enum class Isa { baseline = 0, avx2 = 1, avx512 = 2 };

inline const char* isa_name(Isa isa) {
  constexpr const char* names[] = {"baseline", "avx2", "avx512"};
  return names[static_cast<int>(isa)];
}

// The best instruction set of this processor: x86-64-v4, x86-64-v3 or the baseline.
inline Isa best_isa() {
#if defined(PATHPRUNE_X86)
  __builtin_cpu_init();
  const bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                  __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2");
  const bool v4 = v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                  __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                  __builtin_cpu_supports("avx512vl");
  return v4 ? Isa::avx512 : v3 ? Isa::avx2 : Isa::baseline;
#else
  return Isa::baseline;
#endif
}

// The instruction set in use: the best one, or a lesser one that the environment variable
// PATHPRUNE_ISA (baseline, avx2, avx512) names. Read once.
inline Isa chosen_isa() {
  static const Isa chosen = [] {
    const Isa best = best_isa();
    const char* wanted = std::getenv("PATHPRUNE_ISA");
    for (Isa isa : {Isa::baseline, Isa::avx2}) {
      if (wanted && isa < best && std::string_view(wanted) == isa_name(isa)) return isa;
    }
    return best;
  }();
  return chosen;
}

template <typename Function>
Function* pick_by_isa(Function* baseline, Function* avx2, Function* avx512) {
  Function* const functions[] = {baseline, avx2, avx512};
  return functions[static_cast<int>(chosen_isa())];
}

}  // namespace pathprune

#if defined(PATHPRUNE_X86)
#define PP_IN_EVERY_ISA(...) \
  namespace baseline {       \
  __VA_ARGS__                \
  }                          \
  namespace avx2 {           \
  __VA_ARGS__                \
  }                          \
  namespace avx512 {         \
  __VA_ARGS__                \
  }
#define PP_BY_ISA(function) \
  ::pathprune::pick_by_isa(&baseline::function, &avx2::function, &avx512::function)
#else
#define PP_IN_EVERY_ISA(...) \
  namespace baseline {       \
  __VA_ARGS__                \
  }
#define PP_BY_ISA(function) (&baseline::function)
#endif
