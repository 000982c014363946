# Two commands: `make demo` shows a whole study on this machine, `make test` checks everything.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile --constraint constraints.txt

.PHONY: demo story test lint docs test-slow test-gpu clean
.DEFAULT_GOAL := help

help:
	@sed -n 's/^## //p' $(MAKEFILE_LIST)

$(VENV)/installed: pyproject.toml constraints.txt
	@echo "Installing loratune into $(VENV) (a minute or two) ..."
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(PIP) --editable .
	@touch $@

$(VENV)/installed-dev: $(VENV)/installed
	@$(PIP) --editable '.[nni,compare,dev,docs]'
	@touch $@

## make demo       tune the embedded model from scratch: a whole study in a few minutes, no network
demo: $(VENV)/installed
	@$(BIN)/loratune run --demo

## make story      what follows a study: score the demo's ten best, race the finalists, choose one
story: demo
	@$(BIN)/loratune evaluate runs/demo --allow-code-execution
	@$(BIN)/loratune select runs/demo --yes

## make test       style, types and tests
test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal --durations 15 -m "not slow and not gpu"

## make lint       style and types only
lint: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

## make test-slow  the checks that take long
test-slow: $(VENV)/installed-dev
	$(BIN)/python -m pytest -m "slow and not gpu"

## make test-gpu   the checks that need a CUDA device
test-gpu: $(VENV)/installed-dev
	$(BIN)/python -m pytest -rA -m gpu

## make docs       the documentation, into site/
docs: $(VENV)/installed-dev
	$(BIN)/sphinx-build --quiet --fail-on-warning docs site

clean:
	rm -rf $(VENV) site .mypy_cache .pytest_cache .ruff_cache runs
