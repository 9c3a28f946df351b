# `make demo` and `make test` do all their own set-up; they need Python 3.10 or newer, a C++17 compiler and make.
#   PYTHON=python3.12 make demo     another interpreter
#   PIP_ARGS="--proxy ..." make     more arguments for pip
#   DEMO_ARGS="--restart" make demo arguments of `lowbit demo`
#   REPORT_ARGS="--docs docs" make bench     also rewrite the measured section of docs/KERNELS.md (--name: see report.py)

VENV ?= .venv
PIP_ARGS ?=
DEMO_ARGS ?=
BENCH_ARGS ?=
REPORT_ARGS ?=
TEST_ARGS ?=
ifneq ($(origin PYTHON), undefined)
  CHOSEN := --chosen
endif
PYTHON ?= python3
BIN := $(VENV)/bin
CPP := $(shell find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' | sort)

# kernels/ and tools/ must never be importable by their bare names.
export PYTHONSAFEPATH := 1
.PHONY: help setup demo test bench lint format clean
.DEFAULT_GOAL := help

help:  ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' Makefile

setup:  ## the virtual environment and the compiled extension, made only where something changed
	@command -v $(PYTHON) >/dev/null || { echo "make: $(PYTHON) is missing; install Python 3.10 or newer:" \
	  "sudo apt install python3 python3-venv python3-dev (Debian) or sudo dnf install python3-devel (Fedora)" >&2; exit 1; }
	@PIP_ARGS="$(PIP_ARGS)" $(PYTHON) tools/bootstrap.py $(CHOSEN) --venv $(VENV)

demo: setup  ## train, quantize, pack, run and rescore: the main job in five minutes
	@$(BIN)/lowbit demo $(DEMO_ARGS)

test: setup  ## the test suite
	$(BIN)/pytest $(TEST_ARGS)

bench: setup  ## the benchmarks in a quarter of an hour (BENCH_ARGS=--quick: two minutes); results in runs/bench
	@mkdir -p runs/bench
	-@$(BIN)/python -m pip install -q --disable-pip-version-check $(PIP_ARGS) -c constraints.txt onnxruntime onnx
	$(BIN)/pytest bench --benchmark-enable --benchmark-only --benchmark-json runs/bench/pytest-benchmark.json $(BENCH_ARGS)
	$(BIN)/python bench/report.py runs/bench/kernels$(if $(findstring --quick,$(BENCH_ARGS)),-quick).jsonl $(REPORT_ARGS)
	$(BIN)/python bench/train_step.py

lint: setup  ## ruff and clang-format, changing nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(CPP)

format: setup  ## let ruff and clang-format rewrite the sources
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP)

clean:  ## remove what was built and the virtual environment; runs/ stays
	rm -rf build $(VENV) *.egg-info lowbit/*.so .pytest_cache .ruff_cache .hypothesis
