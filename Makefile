# `make demo` and `make test` need Python >= 3.10 with pip, g++ and make; they work in .venv and touch nothing else.
# To use another torch: make demo TORCH='torch==2.11.0' or TORCH=path/to/torch.whl

PYTHON ?= python3
TORCH ?= torch==2.13.0 triton==3.7.1
VENV ?= .venv
BIN := $(VENV)/bin
INSTALL_INPUTS := pyproject.toml setup.py CMakeLists.txt $(wildcard csrc/*)

.PHONY: demo test lint gpu clean

demo: $(VENV)/.demo-installed
	$(BIN)/sra2-fast train --config configs/digits.toml --out runs/digits
	$(BIN)/python benchmarks/step_time.py
	@echo "The sample grids are under runs/digits/samples."

test: $(VENV)/.dev-installed
	$(BIN)/python -m pytest -n 2 -q

lint: $(VENV)/.dev-installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

gpu: $(VENV)/.dev-installed
	$(BIN)/python benchmarks/gpu_suite.py --out benchmarks/results

# torch first: left to the resolver, an unpinned torch may bring gigabytes of CUDA packages to a machine without a GPU.
$(VENV)/.torch-installed:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --no-compile $(TORCH)
	@touch $@

# Without a GPU the demo leaves the CUDA kernels out: nobody would run them, and nvcc takes its time.
$(VENV)/.demo-installed: $(VENV)/.torch-installed $(INSTALL_INPUTS)
	SRA2_BUILD_CUDA=$(if $(shell command -v nvidia-smi),auto,0) $(BIN)/python -m pip install -q -e '.[demo]'
	@touch $@

$(VENV)/.dev-installed: $(VENV)/.torch-installed $(INSTALL_INPUTS)
	$(BIN)/python -m pip install -q -e '.[dev]'
	@touch $@

clean:
	rm -rf build dist *.egg-info sra2_fast/*.so sra2_fast/_build.json .pytest_cache .mypy_cache .ruff_cache
