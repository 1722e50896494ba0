# make quickstart: set up and train.   make test: the tests.   make check: lint and types.   make laws: every test.
PYTHON ?= python3
TORCH ?= 2.13.0
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
# A process for each core; the tests of a file stay together, since they share what was dear to make.
WORKERS := -n logical --dist loadfile
# PyTorch's public index of CPU builds: PyPI's own Linux build brings several GB of CUDA libraries.
CPU_INDEX := https://download.pytorch.org/whl/cpu

.PHONY: quickstart install test check laws clean
.DELETE_ON_ERROR:

quickstart: install
	$(BIN)/launch train --config configs/quickstart.yaml $(ARGS)

test: .venv/dev
	$(BIN)/python -m pytest $(WORKERS) $(ARGS)

laws: .venv/dev
	$(BIN)/python -m pytest $(WORKERS) -m "laws or not laws" $(ARGS)

check: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy -p farspan.kernels -p farspan.parallel -p farspan.models -p farspan.platform -p farspan.launch

install: .venv/installed

.venv/torch:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "farspan needs Python 3.11 or newer: make PYTHON=python3.12")'
	$(PYTHON) -m venv .venv
	@if command -v nvidia-smi > /dev/null && nvidia-smi > /dev/null 2>&1; then \
		echo "an NVIDIA driver is here: installing torch $(TORCH) with CUDA"; $(PIP) install -q torch==$(TORCH); \
	elif $(PIP) install -q --dry-run --no-deps --ignore-installed --report - torch==$(TORCH) 2> /dev/null | grep -q '"version": "$(TORCH)+cpu"'; then \
		echo "installing torch $(TORCH) for the CPU"; $(PIP) install -q torch==$(TORCH); \
	else \
		echo "installing torch $(TORCH) for the CPU from $(CPU_INDEX)"; \
		$(PIP) install -q torch==$(TORCH) --extra-index-url $(CPU_INDEX); \
	fi
	touch $@

# A stale build/ would ship modules that were deleted since.
.venv/installed: pyproject.toml .venv/torch
	rm -rf build
	@echo "installing farspan and what it needs (ray, wandb and others; a minute or two)"
	$(PIP) install -q "setuptools>=77" wheel
	$(PIP) install -q --no-build-isolation -e .
	touch $@

.venv/dev: .venv/installed
	$(PIP) install -q --no-build-isolation -e ".[dev]"
	touch $@

clean:
	rm -rf .venv build *.egg-info
