# pathprune's developer commands. `make help` lists them. Needs python3, make and a C++ compiler.

VENV ?= .venv
PYTHON ?= python3
TORCH ?= torch==2.13.0
BUILD ?= build/editable
PYTEST_WORKERS ?= 2
PYTEST_ARGS ?=
BIN := $(VENV)/bin
INSTALLED := $(BUILD)/.installed
PIP := $(BIN)/python -m pip install --disable-pip-version-check -q
CSRC := find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.inc' | sort
BUILD_TOOLS := "scikit-build-core>=1.0,<2" "pybind11>=3.0,<4" "cmake>=3.26" "ninja>=1.11"

# Developers and CI compile for one GPU generation; wheels for more (pyproject.toml).
export CMAKE_CUDA_ARCHITECTURES ?= 90

WHEEL_ARCHITECTURES ?= 80-real;90
WHEEL = $(lastword $(sort $(wildcard dist/pathprune-*manylinux*.whl)))
CHECK_ARGS ?=

# Two builds at once in one folder would spoil each other.
LOCK := $(if $(shell command -v flock),flock $(BUILD).lock)
SITE = $(shell $(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("platlib"))')

.DEFAULT_GOAL := help
.PHONY: help demo test test-all bench scaling lint format build kernels sanitize docs tables wheel wheel-check sdist clean

help:  ## list these commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: build  ## prune a ResNet-50 by 100 rounds of SynFlow, then train pruned nets on digits
	$(BIN)/python -m pathprune.demo

test: build  ## every test that takes less than ten seconds
	$(BIN)/python -m pytest -q -m "not slow" -n $(PYTEST_WORKERS) $(PYTEST_ARGS)

test-all: build  ## every test
	$(BIN)/python -m pytest -q $(PYTEST_ARGS)

bench: build  ## measure against the published loops and the best plain PyTorch
	THP_MEM_ALLOC_ENABLE=1 OMP_NUM_THREADS=1 $(BIN)/python benchmarks/run.py --out benchmarks/results

scaling: build  ## time against weights, depth, density, rounds, threads and batch: JSON and a plot
	THP_MEM_ALLOC_ENABLE=1 $(BIN)/python benchmarks/scaling.py --out benchmarks/results

tables: $(INSTALLED)  ## write the tables of README.md and docs/ anew from benchmarks/results
	$(BIN)/python scripts/readme_tables.py --write

lint: $(INSTALLED)  ## ruff, clang-format, mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(CSRC) | xargs $(BIN)/clang-format --dry-run -Werror
	$(BIN)/mypy

format: $(INSTALLED)  ## lay the code out as `make lint` wants it
	$(BIN)/ruff check --fix-only -q .
	$(BIN)/ruff format .
	$(CSRC) | xargs $(BIN)/clang-format -i

# A target of its own, not a dependency on sources: CMake knows what is out of date, and says so
# in a second when nothing is.
build: $(INSTALLED)  ## compile and install into .venv, what is out of date only
	$(LOCK) $(BIN)/cmake --build $(BUILD)
	@$(LOCK) $(BIN)/cmake --install $(BUILD) --prefix $(SITE) >/dev/null

kernels: build  ## registers, shared memory and spills of every CUDA kernel; spills fail
	$(BIN)/python scripts/check_kernels.py --build $(BUILD)

sanitize: $(INSTALLED)  ## the CPU ops under the address and undefined-behaviour sanitizers
	scripts/sanitize.sh $(BIN)/python $(PYTEST_ARGS)

docs: $(INSTALLED) $(VENV)/.pathprune-docs  ## the documentation as a site in build/site; warnings are errors
	$(BIN)/python -m sphinx -W --keep-going -q -b html docs build/site

# Not built by the editable install's cache: a wheel carries code for every GPU generation that is served.
wheel: $(INSTALLED) $(VENV)/.pathprune-wheel  ## a manylinux wheel in dist/, and what it asks of torch and of the system
	rm -rf build/wheel-raw
	CMAKE_CUDA_ARCHITECTURES="$(WHEEL_ARCHITECTURES)" $(BIN)/python -m pip wheel -q --disable-pip-version-check \
	  --no-build-isolation --no-deps -C build-dir=build/wheel -w build/wheel-raw .
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m auditwheel repair --plat auto -w dist \
	  --exclude "libtorch*.so" --exclude libc10.so build/wheel-raw/*.whl
	$(BIN)/python scripts/abi_audit.py dist/*manylinux*.whl

wheel-check:  ## try the wheel in clean environments with several releases of torch (downloads GBs)
	$(BIN)/python scripts/wheel_check.py $(WHEEL) $(CHECK_ARGS)

sdist: $(INSTALLED)  ## the source distribution in dist/
	$(BIN)/python -c "import scikit_build_core.build as build; print('dist/' + build.build_sdist('dist'))"

clean:  ## remove what was built; .venv stays
	rm -rf build .mypy_cache .pytest_cache .ruff_cache .hypothesis

# ---- set-up: each step leaves a stamp and is not repeated ------------------------------------

$(VENV)/.pathprune-tools:
	@scripts/check_tools.sh "$(PYTHON)"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing $(TORCH) and the build tools into $(VENV)."
	$(PIP) $(TORCH)
	$(PIP) $(BUILD_TOOLS)
	@touch $@

$(VENV)/.pathprune-docs $(VENV)/.pathprune-wheel: $(VENV)/.pathprune-%: pyproject.toml $(VENV)/.pathprune-tools
	$(BIN)/python scripts/extra.py $* >$@.txt
	$(PIP) -r $@.txt
	@mv $@.txt $@

$(INSTALLED): pyproject.toml $(VENV)/.pathprune-tools
	@scripts/check_tools.sh $(BIN)/python
	@mkdir -p $(dir $(BUILD))
	@echo "Compiling and installing pathprune: minutes the first time, seconds from then on."
	@$(LOCK) $(PIP) --no-build-isolation -C build-dir=$(BUILD) -e ".[dev]"
	@touch $@
