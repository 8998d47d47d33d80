#!/usr/bin/env bash
# Builds, tests and measures on a machine with an NVIDIA GPU and no network, from what is there: nvcc,
# python3 with a CUDA torch, pybind11, scikit-build-core, cmake, ninja, pytest, hypothesis.
#   scripts/gpu.sh build-and-test [pytest arguments]
#   scripts/gpu.sh sanitize       [pytest arguments]    compute-sanitizer over the op tests
#   scripts/gpu.sh bench          [arguments of benchmarks/run.py]
# Every step is stopped after ten minutes, and leaves gpu-STEP.json in $OUT (benchmarks/results).
set -uo pipefail
cd "$(dirname "$0")/.."
export OUT=${OUT:-benchmarks/results}
PYTHON=${PYTHON:-python3}
SITE=$PWD/build/gpu/site
LIMIT=${LIMIT:-585} # seconds a step
failed=0

mkdir -p "$OUT" build/gpu
export PYTHONPATH=$SITE${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 PATHPRUNE_REQUIRE_CUDA=1

# The GPU generation of this machine, such as 90.
generation() {
  "$PYTHON" -c 'import torch; print("%d%d" % torch.cuda.get_device_capability())' 2>/dev/null || echo 90
}

# step NAME COMMAND...: runs it, shows and keeps its output, writes its summary.
step() {
  local name=$1 log=build/gpu/$1.log started=$SECONDS status
  shift
  echo "== $name: $*"
  timeout --kill-after=10 "$LIMIT" "$@" 2>&1 | tee "$log"
  status=${PIPESTATUS[0]}
  summarise "$name" "$status" $((SECONDS - started)) "$log"
  ((status == 0)) || failed=1
  return "$status"
}

# summarise NAME STATUS SECONDS LOG
summarise() {
  "$PYTHON" scripts/gpu_summary.py "$OUT/gpu-$1.json" --step "$1" --status "$2" --seconds "$3" --log "$4"
}

build() {
  rm -rf "$SITE"
  export CMAKE_CUDA_ARCHITECTURES=${CMAKE_CUDA_ARCHITECTURES:-$(generation)}
  PATHPRUNE_CUDA=ON step build "$PYTHON" -m pip install --no-build-isolation --no-deps --no-index \
    --disable-pip-version-check -C build-dir=build/gpu/cmake --target "$SITE" . || exit 1
  "$PYTHON" -m pathprune.info
}

case ${1:-} in
  build-and-test)
    shift
    build
    step test-cuda "$PYTHON" -m pytest -q -rf --durations=10 -m "cuda and not slow" "$@"
    step test-cpu "$PYTHON" -m pytest -q -rf --durations=10 -m "not cuda and not slow" "$@"
    ;;
  sanitize)
    shift
    [[ -d $SITE ]] || build
    tool=$(command -v compute-sanitizer || echo /usr/local/cuda/bin/compute-sanitizer)
    if [[ ! -x $tool ]]; then
      echo "sanitize: compute-sanitizer is not on this machine; nothing was checked" | tee build/gpu/sanitize.log
      summarise sanitize skipped 0 build/gpu/sanitize.log
      exit 0
    fi
    shopt -s nullglob
    tests=(tests/test_ops*.py tests/test_op_*.py)
    # torch's caching allocator would hide an access beyond the end of a tensor.
    export PYTORCH_NO_CUDA_MEMORY_CACHING=1
    for check in memcheck racecheck; do
      step "sanitize-$check" "$tool" --tool "$check" --error-exitcode 99 --target-processes all \
        "$PYTHON" -m pytest -q -x -p no:cacheprovider -m "cuda and not slow" "${tests[@]}" "$@" && continue
      if grep -q "Device not supported" "build/gpu/sanitize-$check.log"; then
        echo "sanitize: compute-sanitizer does not support this device here; nothing was checked"
        summarise "sanitize-$check" skipped 0 "build/gpu/sanitize-$check.log"
        exit 0
      fi
    done
    ;;
  bench)
    shift
    [[ -d $SITE ]] || build
    PATHPRUNE_RESULTS=$OUT step bench "$PYTHON" benchmarks/run.py "$@"
    ;;
  *)
    sed -n '2,8s/^# \{0,1\}//p' "$0"
    exit 2
    ;;
esac
exit "$failed"
