# `make demo` and `make test` do all the set-up themselves: a virtual environment in .venv, with what is pinned.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test test-ray fuzz gpu-check clean

demo: $(VENV)/ready
	$(BIN)/python run.py --demo --compare

# As many processes as there are cores, at most 4; PROCESSES=0 makes it one.
PROCESSES ?= logical
test: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest -n $(PROCESSES) --maxprocesses 4 --dist loadfile

# Minutes: a sweep of 16 runs on a local Ray cluster that loses a node, beside the same sweep in one process.
test-ray: $(VENV)/ready
	RAY_SWEEP=1 $(BIN)/python -m pytest tests/test_ray.py

# Ten thousand damaged scenes, config files, checkpoints and results, each of which must be read or refused in words.
# Writes benchmarks/results/fuzz.json; FUZZ="--seed 2 --count 1000" tries others.
fuzz: $(VENV)/ready
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.fuzz_inputs $(FUZZ)

# On a CUDA machine, in under 10 minutes: as much of a full lego training as fits, the tests marked cuda, kernels and a step
# timed beside their twins, and in the time left half the rays beside it and compute-sanitizer. Writes
# benchmarks/results/gpu_check.json. GPU_PYTHON=... uses a Python that has torch already; GPU_CHECK="--full" does all of
# it as a whole, without a limit of time.
GPU_PYTHON ?= $(BIN)/python
gpu-check: $(if $(filter $(BIN)/python,$(GPU_PYTHON)),$(VENV)/ready)
	$(GPU_PYTHON) -m benchmarks.gpu_check $(GPU_CHECK)

$(VENV)/ready: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache
