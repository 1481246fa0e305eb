# Each target sets up what it needs first. Python 3.11 or newer is all that has to be there.
#
#   PYTHON       the interpreter that makes the virtual environment
#   VENV         where that is: `make test PYTHON=python3.13 VENV=.venv-3.13` tries another one
#   SECONDS      how long `make soak` lasts
#   PYTEST_ARGS  more arguments for pytest, such as `-k retry` or a file
#   LEGS, ALL    of make matrix: what has to be run, such as "16 15-pooled"; 1 for the whole suite

PYTHON ?= python3
VENV ?= .venv
PYTEST_ARGS ?=
LEGS ?=
ALL ?=
SECONDS ?= 21600

BIN := $(VENV)/bin
NONE = { status=$$?; test "$(PYTEST_ARGS)" -a $$status = 5 || exit $$status; }
INSTALLED := $(VENV)/installed

NIGHTLY := faults server storage soak mutants others
FAULTS := tests/faults/test_crashes.py tests/faults/test_pauses.py tests/faults/test_permute.py
SERVER := tests/faults/test_server.py tests/faults/test_network.py
STORAGE := tests/faults/test_storage.py tests/faults/test_waking.py tests/faults/test_retention.py
SOAK := tests/faults/test_soak.py
MUTANTS := tests/faults/test_mutants.py

.PHONY: demo test lint bench nightly $(NIGHTLY:%=nightly-%) matrix containers soak wheel

demo: $(INSTALLED)
	$(BIN)/sqlqueue demo

# Tests that mind company run alone. With PYTEST_ARGS, one half may have nothing to run (5).
test: $(INSTALLED)
	$(BIN)/pytest -n 3 --dist loadfile -m "not alone and not nightly" $(PYTEST_ARGS) || $(NONE)
	$(BIN)/pytest -m "alone and not nightly" $(PYTEST_ARGS) || $(NONE)

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --strict

bench: $(INSTALLED)
	$(BIN)/sqlqueue bench

# The long forms, in parts of less than an hour each; results go into docs/bars.json and its page.
nightly: $(NIGHTLY:%=nightly-%)
nightly-faults: WHAT = $(FAULTS)
nightly-server: WHAT = $(SERVER)
nightly-storage: WHAT = $(STORAGE)
nightly-soak: WHAT = $(SOAK)
nightly-mutants: WHAT = $(MUTANTS)
nightly-others: WHAT = $(patsubst %,--ignore %,$(FAULTS) $(SERVER) $(STORAGE) $(SOAK) $(MUTANTS))
$(NIGHTLY:%=nightly-%): $(INSTALLED)
	SQLQUEUE_BARS=docs/bars.json $(BIN)/pytest -m nightly $(WHAT) $(PYTEST_ARGS)
	$(BIN)/python -m tests.faults.results docs/bars.json docs/bars.md

# Every version of Postgres that is found, beside those of the wheels installed here.
matrix: $(INSTALLED)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[matrix]"
	$(BIN)/python -m tests.matrix $(LEGS) $(if $(ALL),--all)

# Exits 77 (make says so) where no engine of containers can be had.
containers: $(INSTALLED)
	VENV=$(VENV) tests/containers/run

# Longer than the nightly one, which lasts half an hour.
soak: $(INSTALLED)
	SQLQUEUE_SOAK_SECONDS=$(SECONDS) $(BIN)/pytest -s -m nightly $(SOAK) $(PYTEST_ARGS)

wheel: $(INSTALLED)
	rm -rf dist
	$(BIN)/python -m build --wheel

$(INSTALLED): pyproject.toml
	$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("sqlqueue needs Python 3.11 or newer; say which: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[dev]"
	touch $@
