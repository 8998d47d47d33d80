#!/usr/bin/env bash
# Builds, tests and measures on a machine with an NVIDIA GPU and no network, from what is there: nvcc,
# python3 with a CUDA torch, pybind11, cmake, ninja, pytest, hypothesis; on several processes where pytest-xdist is.
#   scripts/gpu.sh all            [arguments of benchmarks/run.py]   build, test, and measure for what time is left
#   scripts/gpu.sh build-and-test [pytest arguments]
#   scripts/gpu.sh test-cpu       [pytest arguments]    what needs no GPU, with this machine's torch
#   scripts/gpu.sh sanitize       [pytest arguments]    compute-sanitizer over the op tests
#   scripts/gpu.sh bench          [arguments of benchmarks/run.py]
# BUDGET (seconds, 570) is for all steps together. After every step $OUT (build/gpu/out) has gpu.json, how each step
# went; gpu.log, all that was printed; results.tgz, what was measured; library.tgz, what was built: unpacked in the
# working tree of a later run, it is not built again.
set -uo pipefail
cd "$(dirname "$0")/.."
export OUT=${OUT:-build/gpu/out}
PYTHON=${PYTHON:-python3}
SITE=$PWD/build/gpu/site
RESULTS=build/gpu/results
BUDGET=${BUDGET:-570}
WORKERS=${WORKERS:-8}
failed=0

# Where they lie when nothing on the PATH says so.
PATH=$(dirname "$(command -v "$PYTHON")"):$PATH:/usr/local/cuda/bin
export PATH PYTHONPATH=$SITE${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 PATHPRUNE_REQUIRE_CUDA=1
mkdir -p "$OUT" "$RESULTS"

# The GPU generation of this machine, such as 90.
generation() {
  "$PYTHON" -c 'import torch; print("%d%d" % torch.cuda.get_device_capability())' 2>/dev/null || echo 90
}

# step NAME MOST COMMAND...: runs it for MOST seconds or for what is left; shows and keeps its output and how it went.
step() {
  local name=$1 limit=$2 log=build/gpu/$1.log started=$SECONDS status
  shift 2
  ((limit < BUDGET - SECONDS)) || limit=$((BUDGET - SECONDS))
  if ((limit < 10)); then
    echo "no time was left for it" >"$log"
    keep "$name" skipped 0 "$log"
    return 1
  fi
  echo "== $name: $*"
  timeout --signal=INT --kill-after=8 "$limit" "$@" 2>&1 | tee "$log"
  status=${PIPESTATUS[0]}
  keep "$name" "$status" $((SECONDS - started)) "$log"
  ((status == 0)) || failed=1
  return "$status"
}

# keep NAME STATUS SECONDS LOG: brings $OUT up to date, for a run that is cut off later.
keep() {
  "$PYTHON" scripts/gpu_summary.py "$OUT/gpu.json" --step "$1" --status "$2" --seconds "$3" --log "$4"
  { echo "== $1"; cat "$4"; } >>"$OUT/gpu.log"
  [[ -z $(ls -A "$RESULTS") ]] || tar czf "$OUT/results.tgz" -C "$RESULTS" .
}

# What the libraries are made from: sources and the versions that they are built with and for.
sources() {
  {
    find csrc cmake CMakeLists.txt -type f -print0 | sort -z | xargs -0 sha256sum
    "$PYTHON" -c 'import sys, torch; print(sys.version, torch.__version__)'
    generation
  } | sha256sum
}

# In this process group of its own: `timeout` ends all of it.
library() {
  export CMAKE_CUDA_ARCHITECTURES=${CMAKE_CUDA_ARCHITECTURES:-$(generation)}
  PATHPRUNE_CUDA=ON "$PYTHON" -m pip install --no-build-isolation --no-deps --no-index --no-cache-dir \
    --disable-pip-version-check -C build-dir=build/gpu/cmake --target "$SITE" . && return
  echo "pip could not build it; cmake alone"
  rm -rf "$SITE" build/gpu/cmake
  cmake -S . -B build/gpu/cmake -G Ninja -DCMAKE_BUILD_TYPE=Release -DPATHPRUNE_CUDA=ON \
    -DPython_EXECUTABLE="$(command -v "$PYTHON")" -DCMAKE_CUDA_ARCHITECTURES="$CMAKE_CUDA_ARCHITECTURES" &&
    cmake --build build/gpu/cmake && cmake --install build/gpu/cmake --prefix "$SITE"
}

build() {
  local made=$SITE/.made-from
  if [[ ! -f $made || $(<"$made") != "$(sources)" ]]; then
    rm -rf "$SITE"
    step build 400 "$0" library || exit 1
    sources >"$made"
    tar czf "$OUT/library.tgz" build/gpu/site
  fi
  mkdir -p "$SITE/pathprune"
  cp -r python/pathprune/. "$SITE/pathprune/"
  step info 60 "$PYTHON" -m pathprune.info
  "$PYTHON" -c 'from pathprune import _library as l; assert l.core and l.cuda_loaded, l.cuda_error' || exit 1
}

# tests NAME MOST WHICH [pytest arguments]: a test that hangs ends its process, and another one goes on with the rest.
tests() {
  local name=$1 most=$2 which=$3 many=()
  shift 3
  if "$PYTHON" -c 'import xdist' 2>/dev/null; then many=(-n "$WORKERS" --max-worker-restart=50); fi
  if "$PYTHON" -c 'import pytest_timeout' 2>/dev/null; then many+=(--timeout=90 --timeout-method=thread); fi
  step "$name" "$most" "$PYTHON" -m pytest -q -rfE --tb=short --durations=15 -p no:cacheprovider "${many[@]}" \
    -m "$which" "$@"
}

bench() {
  step bench 570 "$PYTHON" benchmarks/run.py --device cuda --out "$RESULTS" "$@"
}

# The files that have tests for a GPU: to collect the others takes each process many seconds.
mapfile -t on_cuda < <(grep -lE 'mark\.cuda|\bdevice\b' tests/test_*.py)

case ${1:-} in
  library)
    library
    exit
    ;;
  all)
    shift
    build
    # A few kernels of every kind first: what fails in all of them is read in seconds.
    first=(tests/test_cuda_kernels.py tests/test_tiled_products.py)
    tests test-first 120 "cuda and not slow" "${first[@]}"
    tests test-cuda 300 "cuda and not slow" "${first[@]/#/--ignore=}" "${on_cuda[@]}"
    bench --quick "$@"
    ;;
  build-and-test)
    shift
    build
    tests test-cuda 570 "cuda and not slow" "${@:-${on_cuda[@]}}"
    ;;
  test-cpu)
    shift
    build
    PATHPRUNE_REQUIRE_CUDA=0 tests test-cpu 570 "not cuda and not slow" "$@"
    ;;
  sanitize)
    shift
    build
    tool=$(command -v compute-sanitizer || echo /usr/local/cuda/bin/compute-sanitizer)
    if [[ ! -x $tool ]]; then
      echo "compute-sanitizer is not on this machine; nothing was checked" | tee build/gpu/sanitize.log
      keep sanitize skipped 0 build/gpu/sanitize.log
      exit 0
    fi
    # torch's caching allocator would hide an access beyond the end of a tensor. Ten to a hundred times slower than
    # without: the cases at the edges of tiles, and few of each.
    export PYTORCH_NO_CUDA_MEMORY_CACHING=1
    chosen=(tests/test_cuda_kernels.py tests/test_tiled_products.py tests/test_walk_kernels.py tests/test_ops.py)
    for check in memcheck racecheck synccheck; do
      step "sanitize-$check" 280 "$tool" --tool "$check" --error-exitcode 99 --target-processes all \
        "$PYTHON" -m pytest -q -x -p no:cacheprovider -m "cuda and not slow" "${chosen[@]}" "$@" && continue
      if grep -q "Device not supported" "build/gpu/sanitize-$check.log"; then
        echo "compute-sanitizer does not support this device here; nothing was checked"
        keep "sanitize-$check" skipped 0 "build/gpu/sanitize-$check.log"
        exit 0
      fi
    done
    ;;
  bench)
    shift
    build
    bench "$@"
    ;;
  *)
    sed -n '2,14s/^# \{0,1\}//p' "$0"
    exit 2
    ;;
esac
exit "$failed"
