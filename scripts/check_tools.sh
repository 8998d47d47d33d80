#!/usr/bin/env bash
# Says what a build of pathprune would miss on this machine. `check_tools.sh PYTHON`
set -euo pipefail
python=${1:-python3}
missing=()

if ! command -v "$python" >/dev/null; then
  missing+=("Python 3.10 or newer ('$python' was not found; set PYTHON=)")
elif ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))'; then
  missing+=("Python 3.10 or newer ('$python' is $("$python" -V 2>&1); set PYTHON=)")
elif ! "$python" -c 'import ensurepip, venv' 2>/dev/null; then
  missing+=("Python's venv module (Debian, Ubuntu: apt-get install python3-venv)")
fi

compiler=${CXX:-}
for candidate in c++ g++ clang++; do
  [[ -n $compiler ]] || ! command -v "$candidate" >/dev/null || compiler=$candidate
done
if [[ -z $compiler ]] || ! command -v "${compiler%% *}" >/dev/null; then
  missing+=("a C++20 compiler such as g++ 11 (Debian, Ubuntu: apt-get install g++; or set CXX=)")
fi

if ((${#missing[@]})); then
  printf 'pathprune cannot be built here. Missing:\n' >&2
  printf '  - %s\n' "${missing[@]}" >&2
  exit 1
fi

if [[ ${PATHPRUNE_CUDA:-AUTO} != OFF && -z ${CUDACXX:-} ]] && ! command -v nvcc >/dev/null &&
  [[ ! -x /usr/local/cuda/bin/nvcc ]]; then
  echo "note: nvcc was not found, so the CUDA library will not be built; the CPU library will." >&2
fi
