# Needs python3 (3.11 or newer) with venv and pip, make and git; everything else goes into .venv.
# `make help` lists the targets. A target explains itself in the `##` comment beside it.
# PYTEST_ARGS is handed to pytest: `make test PYTEST_ARGS="-n 2 -k embedded"` (each xdist worker starts a mongod of its own).

PYTHON ?= python3
PYTEST_ARGS ?= -n 2 --dist worksteal
BENCH_ARGS ?= all
RELIABILITY_ARGS ?=
# `make mutants MUTANT_ARGS="--tenth today --detectors explorer,quick --likely-only"`; `MUTANT_ARGS=--help` lists the options.
MUTANT_ARGS ?= --detectors explorer,quick --likely-only

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DOCS_STAMP := $(VENV)/.installed-docs

.PHONY: help demo test test-slow test-all mutants lint format docs bench reliability clean
.DEFAULT_GOAL := test

$(STAMP): pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "streamline-pool needs Python 3.11 or newer, found " + sys.version.split()[0] + "; try: make PYTHON=python3.12 ...")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[dev]"
	touch $@

$(DOCS_STAMP): $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[docs]"
	touch $@

help: ## List the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "%-11s %s\n", $$1, $$2}'

demo: $(STAMP) ## Index the standard library on a private MongoDB, with one worker killed half-way
	$(BIN)/streamline-pool demo

test: $(STAMP) ## Run the quick tests (the default target)
	$(BIN)/python -m pytest -m "not slow and not chaos" $(PYTEST_ARGS)

# Chaos has the machine to itself, one test after the other: it measures how soon the runs of killed workers go on.
test-slow: $(STAMP) ## Run the slow tests, then the chaos tests
	$(BIN)/python -m pytest -m "slow and not chaos" $(PYTEST_ARGS)
	$(BIN)/python -m pytest -m chaos -n 0

test-all: test test-slow ## Run every test

mutants: $(STAMP) ## Plant 200 bugs, one after the other, and show which tests find each; takes more than an hour
	$(BIN)/python -m tests.mutants $(MUTANT_ARGS)

lint: $(STAMP) ## Check style, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy streamline_pool loadtests examples tests

format: $(STAMP) ## Mend what ruff can mend, and format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: export NO_MKDOCS_2_WARNING := 1
docs: $(DOCS_STAMP) ## Build the documentation site into ./site; a warning is an error
	$(BIN)/python -m mkdocs build --strict --clean

bench: $(STAMP) ## Run the load tests and print each figure beside its reference
	$(BIN)/python -m loadtests $(BENCH_ARGS)

reliability: $(STAMP) ## Measure what docs/reliability.md says, which takes a day, and make that page
	$(BIN)/python -m tests.reliability $(RELIABILITY_ARGS)

clean: ## Remove the virtual environment and everything that was built
	rm -rf $(VENV) build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
