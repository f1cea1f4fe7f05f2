# One word per habit. `make` alone lists them.
#
# VENV names the environment that everything is installed into; stamps inside it say what stands there, so nothing is
# installed again unless the requirements or the protos changed.

VENV ?= .venv
# The first Python that is new enough; name another by `make PYTHON=...`.
PYTHON ?= $(shell for python in python3 python3.13 python3.12 python3.11; do \
  $$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$python && break; done)
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help
# Two installs into one environment at a time would break it, and nothing here gains from `make -j`.
.NOTPARALLEL:

BIN := $(VENV)/bin
PROTOS := $(wildcard protos/umbel/*/*.proto)
REQUIREMENTS := pyproject.toml constraints.txt hatch_build.py $(PROTOS)
INSTALL = "$(BIN)/python" -m pip install --quiet --disable-pip-version-check -c constraints.txt
TREES := protos models client server simulations tests .ci hatch_build.py
WORKERS ?= 2
PYTEST_ARGS ?=
# Tests start hundreds of programs; each would compile Umbel's sources anew.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help demo dev test test-all lint fix protos docs bench bench-private bench-deltas bench-runtime bench-simulation mutants mutants-releases mutants-serving tuf-conformance show-secrecy pins clean

help: ## List these words.
	@grep -hE '^[a-z-]+:.*## ' Makefile | sed -E 's/^([a-z-]+):.*## /\1\t/' | \
	  while IFS=$$'\t' read -r word text; do printf '  make %-16s %s\n' "$$word" "$$text"; done

demo: $(VENV)/.demo-installed ## Twenty devices learn together on this machine, on real data.
	@"$(BIN)/python" -m umbel_simulations.demo $(DEMO_ARGS)

dev: $(VENV)/.dev-installed ## Install everything that working on Umbel needs.

test: $(VENV)/.dev-installed ## The quick tests (about six minutes on two cores).
	@"$(BIN)/python" -m pytest -q -n $(WORKERS) -m "not slow" $(PYTEST_ARGS)

test-all: $(VENV)/.dev-installed ## All tests, the slow ones too (fourteen minutes to twenty).
	@"$(BIN)/python" -m pytest -q -n $(WORKERS) $(PYTEST_ARGS)

lint: $(VENV)/.dev-installed ## Format, lint, types, import contracts, protos: everything that is checked without running.
	@"$(BIN)/ruff" format --check $(TREES)
	@"$(BIN)/ruff" check $(TREES)
	@"$(BIN)/mypy"
	@"$(BIN)/lint-imports" --no-cache
	@"$(BIN)/buf" lint
	@"$(BIN)/buf" breaking --against tests/vectors/wire.binpb
	@"$(BIN)/buf" format --diff --exit-code
	@echo "lint: all checks passed"

fix: $(VENV)/.dev-installed ## Mend what format and lint can mend by themselves.
	@"$(BIN)/ruff" check --fix --exit-zero --quiet $(TREES)
	@"$(BIN)/ruff" format $(TREES)
	@"$(BIN)/buf" format --write

protos: $(VENV)/.dev-installed ## Generate Python from the protos again, after an edit.
	@"$(BIN)/python" hatch_build.py

docs: $(VENV)/.dev-installed ## Run the commands that the pages show, and hold what they say to the code.
	@"$(BIN)/python" -m pytest -q tests/test_docs_*.py tests/*/test_*_page.py $(PYTEST_ARGS)

bench: $(VENV)/.dev-installed ## Measure speed, memory and learning, side by side with other ways.
	@"$(BIN)/python" -m tests.benchmarks $(BENCH_ARGS)

bench-private: $(VENV)/.dev-installed ## Measure private rounds: device, leader and helper, bytes, memory, against SecAgg+.
	@"$(BIN)/python" -m tests.benchmarks private private_memory $(BENCH_ARGS)

bench-deltas: $(VENV)/.dev-installed ## Measure deltas between versions: sizes, accuracy of int8, time and memory to rebuild.
	@"$(BIN)/python" -m tests.benchmarks deltas $(BENCH_ARGS)

bench-runtime: $(VENV)/.dev-installed ## Measure the zoo's bundles against torch: speed by batch, memory, compiling.
	@"$(BIN)/python" -m tests.benchmarks runtime predictor $(BENCH_ARGS)

bench-simulation: $(VENV)/.dev-installed ## Measure the simulation engines, the cohort one beside FedJAX, pfl-research, Flower on Ray and bare loops.
	@"$(BIN)/python" -m tests.benchmarks simulation fleet $(BENCH_ARGS)

mutants: $(VENV)/.dev-installed ## Take each guard of private rounds out and see a test fail (a quarter of an hour).
	@"$(BIN)/python" -m tests.mutation private

mutants-releases: $(VENV)/.dev-installed ## The same with the guards of releases, rollouts, trust and access (an hour).
	@"$(BIN)/python" -m tests.mutation releases

mutants-serving: $(VENV)/.dev-installed ## The same with the guards of the HTTP port that models answer on (five minutes).
	@"$(BIN)/python" -m tests.mutation serving

tuf-conformance: $(VENV)/.dev-installed ## The public TUF conformance suite against the device's client (SUITE=a checkout, or it is cloned).
	@.ci/tuf-conformance "$(BIN)/python" $(SUITE)

show-secrecy: $(VENV)/.dev-installed ## Play a curious leader and a curious helper, and see what each finds: nothing.
	@"$(BIN)/python" -m tests.private.show_secrecy
	@"$(BIN)/python" -m tests.private.look_inside

pins: ## Resolve all requirements anew in a fresh environment and write constraints.txt.
	@bash .ci/pins "$(PYTHON)"

clean: ## Remove what was built or cached (not the environment).
	@rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	@find protos models client server simulations tests -name __pycache__ -type d -prune -exec rm -rf {} +

# The environments. A demo needs no torch; development needs it all. Both may live in one VENV, one after the other.

$(VENV)/bin/python:
	@if [ -z "$(PYTHON)" ]; then \
	  echo "Umbel needs Python 3.11 or newer and found none on the PATH; name one: make PYTHON=/path/to/python3.11 ..." >&2; exit 1; fi
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Umbel needs Python 3.11 or newer, and $(PYTHON) is $$("$(PYTHON)" --version 2>&1)" >&2; exit 1; }
	@echo "Making an environment in $(VENV) ..."
	@"$(PYTHON)" -m venv "$(VENV)"

$(VENV)/.demo-installed: $(REQUIREMENTS) | $(VENV)/bin/python
	@echo "Installing Umbel's server and device with the demo's data set; the first time this takes a minute ..."
	@$(INSTALL) -e '.[server,litert,examples]'
	@touch "$@"

$(VENV)/.dev-installed: $(REQUIREMENTS) | $(VENV)/bin/python
	@echo "Installing everything for development (torch among it); the first time this takes a few minutes ..."
	@$(INSTALL) -e '.[dev]'
	@touch "$(VENV)/.demo-installed" "$@"
