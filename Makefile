# `make` lists the targets. PYTHON chooses the interpreter, VENV the folder of the virtual environment, ARGS adds
# key=value overrides to the demo: make demo ARGS="run.iterations=5".
PYTHON ?= python3
VENV   ?= .venv
RUN    ?= runs/tinyworld-$(shell date +%Y%m%d-%H%M%S)
ARGS   ?=

BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
PIP     = $(BIN)/python -m pip --disable-pip-version-check install --quiet
TORCH   = $(shell sed -n '/^torch==/p' constraints.txt)

# `python -m` would put the current folder on sys.path, where `import kernels` means ours (Python 3.11 on).
gpu tinyworld docs: export PYTHONSAFEPATH = 1

.PHONY: help install lint format test test-slow bench gpu demo tinyworld docs clean
.DEFAULT_GOAL := help

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# torch first and alone, so that pip takes whichever build of it this machine is set up for (CPU or CUDA) and the
# second step finds it already there.
$(STAMP): setup.py pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; (3, 10) <= v < (3, 14) or sys.exit("strop needs Python 3.10 \
	to 3.13, and $(PYTHON) is %d.%d. Name another: make PYTHON=python3.12" % v)'
	@echo "installing strop and what it needs into $(VENV)"
	@$(PYTHON) -m venv $(VENV) || { echo "$(PYTHON) -m venv failed: on Debian and Ubuntu, apt install python3-venv"; exit 1; }
	@$(PIP) $(TORCH)
	@$(PIP) --constraint constraints.txt --editable ".[test]"
	@touch $@

install: $(STAMP)  ## create .venv with strop (editable) and the tested versions of what it needs

lint: $(STAMP)  ## ruff: rules and format
	@$(BIN)/ruff check --quiet .
	@$(BIN)/ruff format --check --quiet . || { echo "not formatted as ruff does it: run \`make format\`"; exit 1; }

format: $(STAMP)  ## let ruff format the code and mend what it can
	@$(BIN)/ruff check --quiet --fix . || true
	@$(BIN)/ruff format .

test: lint  ## ruff and the fast tests
	@$(BIN)/pytest -q -n logical --dist loadfile

test-slow: lint  ## ruff and all tests, the slow ones too
	@$(BIN)/python -m pytest -q -n logical --dist loadfile -m "slow or not slow"

bench: $(STAMP)  ## time what the design claims to save
	@$(PIP) --constraint constraints.txt --editable ".[bench]"
	$(BIN)/pytest bench --override-ini "python_files=bench_*.py" --benchmark-only --timeout 0 -q

gpu: $(STAMP)  ## test and measure on a GPU, in at most nine minutes; without one, in a tiny form
	@$(PIP) --constraint constraints.txt --editable ".[bench]"
	$(BIN)/python -m strop.bench.gpu

demo: $(STAMP)  ## post-train the tiny world, with a report of what it gained: ARGS="key=value ..." RUN=folder
	$(BIN)/python engine/train.py configs/tinyworld.yaml run.dir=$(RUN) $(ARGS)

tinyworld: $(STAMP)  ## rebuild the tiny world's models from one seed
	$(BIN)/python -m strop.bench.tinyworld.build

docs: $(STAMP)  ## regenerate docs/configuration.md from engine/config/training.py
	$(BIN)/python -m strop.engine.config.docs > docs/configuration.md.new
	@mv docs/configuration.md.new docs/configuration.md

clean:  ## remove what builds and tests leave behind; runs/ and the virtual environment stay
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .benchmarks
	find engine kernels bench tests -name __pycache__ -type d -exec rm -rf {} +
