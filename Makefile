PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := PYTHONWARNINGS=ignore $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
STAMP := $(VENV)/.fedgraft-installed
# A process a core, and a thread each: tiny models gain nothing from more.
TESTS := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n logical --maxprocesses 8 --dist worksteal

export HF_HUB_OFFLINE ?= 1

.PHONY: demo test test-all lint types install bench clean help

help:  ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12

install: $(STAMP)  ## create .venv and install fedgraft into it

# torch first, from the constraint, so that no other package pulls a newer build.
$(STAMP): pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -c 'import sys; sys.exit("fedgraft needs Python 3.11 or newer: make PYTHON=python3.11" if sys.version_info < (3, 11) else 0)'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) torch
	$(PIP) -e '.[demo,merge,partition,simulation,watch,otel,tensorboard,mlflow,dev]'
	@touch $(STAMP)

demo: $(STAMP)  ## four hospitals, real clinical phrases, LoRA with patient-level DP
	$(BIN)/fedgraft simulate hospitals-icd10

test: $(STAMP)  ## the fast tests, under 10 minutes on two cores
	$(TESTS) -m 'not slow'

test-all: $(STAMP)  ## every test
	$(TESTS)

lint: $(STAMP)  ## ruff
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

types: $(STAMP)  ## mypy over the source folders
	$(BIN)/mypy

bench: $(STAMP)  ## overhead of the in-process engine over a bare PyTorch loop
	$(BIN)/python benchmarks/overhead.py

clean:  ## remove the virtual environment and caches
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
