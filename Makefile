# Each target sets up what it needs first. Python 3.11 or newer is all that has to be there.
#
#   PYTHON       the interpreter that makes the virtual environment
#   VENV         where that is: `make test PYTHON=python3.13 VENV=.venv-3.13` tries another one
#   PYTEST_ARGS  more arguments for pytest, such as `-k retry` or a file

PYTHON ?= python3
VENV ?= .venv
PYTEST_ARGS ?=

BIN := $(VENV)/bin
NONE = { status=$$?; test "$(PYTEST_ARGS)" -a $$status = 5 || exit $$status; }
INSTALLED := $(VENV)/installed

.PHONY: demo test lint bench nightly wheel

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

nightly: $(INSTALLED)
	$(BIN)/pytest -m nightly $(PYTEST_ARGS)

wheel: $(INSTALLED)
	rm -rf dist
	$(BIN)/python -m build --wheel

$(INSTALLED): pyproject.toml
	$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("sqlqueue needs Python 3.11 or newer; say which: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[dev]"
	touch $@
