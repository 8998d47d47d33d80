#!/usr/bin/env bash
# The CPU library and `_C` under the address and undefined-behaviour sanitizers, in a build folder of
# their own; what is installed stays as it is. `sanitize.sh PYTHON [pytest arguments]`
set -euo pipefail
cd "$(dirname "$0")/.."
python=${1:?which python}
shift
build=build/sanitize
# CMake's and ninja's own executables, where pip put them beside python.
PATH="$(cd "$(dirname "$python")" && pwd):$PATH"

cmake -S . -B "$build" -G Ninja -DCMAKE_BUILD_TYPE=Debug -DPATHPRUNE_SANITIZE=ON -DPATHPRUNE_CUDA=OFF \
  -DPython_EXECUTABLE="$(command -v python)" --log-level=WARNING
cmake --build "$build"

compiler=$(sed -n 's/^CMAKE_CXX_COMPILER:[A-Z]*=//p' "$build/CMakeCache.txt")
runtime=$("$compiler" -print-file-name=libasan.so)
if [[ ! -e $runtime ]]; then
  echo "sanitize: $compiler has no libasan.so (Debian, Ubuntu: it comes with g++)" >&2
  exit 1
fi

shopt -s nullglob
tests=(tests/test_core.py tests/test_ops*.py tests/test_op_*.py tests/test_walk_ops.py tests/test_walk_kernels.py
  tests/test_masked_matmul.py tests/test_pruned_convolution.py tests/test_thin_sample.py)
# Python and torch keep memory until the process ends, which is no leak of ours. The C++ library comes
# before Python too, for the runtime to find what throws exceptions.
# What they find goes straight to stderr, past the capture of a test that never ends.
LD_PRELOAD="$runtime $("$compiler" -print-file-name=libstdc++.so)" \
  ASAN_OPTIONS=detect_leaks=0:abort_on_error=0:halt_on_error=1 \
  UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1 \
  PATHPRUNE_LIBRARY_DIR="$PWD/$build" \
  python -m pytest -q --capture=sys -p no:cacheprovider -m "not slow" "${tests[@]}" "$@"
echo "sanitize: ${#tests[@]} files of tests ran without a finding"
