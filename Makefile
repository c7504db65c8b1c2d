# Needs python3 (3.11 or newer) with venv and pip, make and git; everything else goes into .venv.
#   make demo | test | test-all | lint | bench
# PYTEST_ARGS is handed to pytest: `make test PYTEST_ARGS="-n 2 -k embedded"` (each xdist worker starts a mongod of its own).

PYTHON ?= python3
PYTEST_ARGS ?= -n 2 --dist worksteal
BENCH_ARGS ?= all

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test test-slow test-all lint format bench clean
.DEFAULT_GOAL := test

$(STAMP): pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "streamline-pool needs Python 3.11 or newer, found " + sys.version.split()[0] + "; try: make PYTHON=python3.12 ...")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[dev]"
	touch $@

demo: $(STAMP)
	$(BIN)/streamline-pool demo

test: $(STAMP)
	$(BIN)/python -m pytest -m "not slow and not chaos" $(PYTEST_ARGS)

# Chaos has the machine to itself: it measures how soon the runs of killed workers go on.
test-slow: $(STAMP)
	$(BIN)/python -m pytest -m "slow and not chaos" $(PYTEST_ARGS)
	$(BIN)/python -m pytest -m chaos $(PYTEST_ARGS)

test-all: test test-slow

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy streamline_pool loadtests examples tests

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(STAMP)
	$(BIN)/python -m loadtests $(BENCH_ARGS)

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
