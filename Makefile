# `make demo` and `make test` do all the set-up themselves: a virtual environment in .venv, with what is pinned.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test check gpu-check clean

demo: $(VENV)/ready
	$(BIN)/python run.py --demo

test: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest

# The CUDA path against the dense twin on the same GPU; writes benchmarks/results/gpu_check.json.
# Uses the Python it is given (GPU_PYTHON=...) or the virtual environment.
GPU_PYTHON ?= $(BIN)/python
gpu-check: $(if $(filter $(BIN)/python,$(GPU_PYTHON)),$(VENV)/ready)
	$(GPU_PYTHON) -m benchmarks.gpu_check

$(VENV)/ready: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache
