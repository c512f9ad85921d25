# `make demo`, `make check` and `make test` need Python >= 3.10 with pip, g++ and make; they work in .venv and touch nothing else.
# To use another torch: make demo TORCH='torch==2.11.0' or TORCH=path/to/torch.whl

PYTHON ?= python3
TORCH ?= torch==2.13.0 triton==3.7.1
VENV ?= .venv
RUNS ?= runs
BIN := $(VENV)/bin
DIGITS := $(RUNS)/digits
STEP_TIMES := $(RUNS)/step_time.txt
INSTALL_INPUTS := pyproject.toml setup.py CMakeLists.txt $(wildcard csrc/*)

.PHONY: demo check quick-test test lint gpu clean

# What is there is shown, not made again: the last two lines say what to delete for that.
demo: $(DIGITS)/.trained $(STEP_TIMES)
	@cat $(STEP_TIMES)
	@echo
	@echo "$(DIGITS) is finished, its last sample grid is $$(ls $(DIGITS)/samples/*.png | tail -n 1): delete $(DIGITS) to train again."
	@echo "The table is $(STEP_TIMES), measured $$(date -r $(STEP_TIMES) '+%F %R'): delete it to measure again."

$(DIGITS)/.trained: | $(VENV)/.demo-installed
	$(BIN)/sra2-fast train --config configs/digits.toml --out $(DIGITS)
	@touch $@

# Batch 2 in four rounds shows what batch 4 does in less than half the time. After the training, never beside it.
$(STEP_TIMES): | $(DIGITS)/.trained
	$(BIN)/python benchmarks/step_time.py --batch-size 2 --steps 4 > $@.part
	@mv $@.part $@

# Lint and the tests that are neither slow nor train: under 90 seconds on two cores, for after every change.
check: $(VENV)/.dev-installed
	@begin=$$(date +%s); $(MAKE) --no-print-directory -j 2 -O lint quick-test; status=$$?; \
	echo "make check: $$(($$(date +%s) - begin)) s"; exit $$status

quick-test: $(VENV)/.dev-installed
	$(BIN)/python -m pytest -n 2 -q -m "not slow and not training"

test: $(VENV)/.dev-installed
	$(BIN)/python -m pytest -n 2 -q

lint: $(VENV)/.dev-installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(wildcard csrc/*.cpp csrc/*.cu csrc/*.h csrc/*.c tests/cuda_on_cpu/*.h)
	$(BIN)/mypy

gpu: $(VENV)/.dev-installed
	$(BIN)/python benchmarks/gpu_suite.py --out benchmarks/results

# torch first: left to the resolver, an unpinned torch may bring gigabytes of CUDA packages to a machine without a GPU.
$(VENV)/.torch-installed:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --no-compile $(TORCH)
	@touch $@

# Without a GPU the demo leaves the CUDA kernels out: nobody would run them, and nvcc takes its time. --no-compile: pip
# would compile all Python files of transformers and its like on one core (31 -> 13 CPU seconds without the extension).
$(VENV)/.demo-installed: $(VENV)/.torch-installed $(INSTALL_INPUTS)
	SRA2_BUILD_CUDA=$(if $(shell command -v nvidia-smi),auto,0) $(BIN)/python -m pip install -q --no-compile -e '.[demo]'
	@touch $@

$(VENV)/.dev-installed: $(VENV)/.torch-installed $(INSTALL_INPUTS)
	$(BIN)/python -m pip install -q -e '.[dev]'
	@touch $@

clean:
	rm -rf build dist *.egg-info sra2_fast/*.so sra2_fast/_build.json .pytest_cache .mypy_cache .ruff_cache
