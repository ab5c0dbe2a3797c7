# `make demo` and `make test` work on a fresh machine: each makes its own
# environment in .venv, once, and installs what it needs there.
PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= /dev/null
BIN := $(VENV)/bin

.PHONY: demo test test-floor lint
.PRECIOUS: $(VENV)/.%
.DELETE_ON_ERROR:

demo: $(VENV)/.demo
	$(BIN)/python -m benchmarks demo

test: $(VENV)/.test
	$(BIN)/python -m pytest -n auto

# The oldest JAX, optax and Flax that pyproject.toml allows.
test-floor:
	$(MAKE) test VENV=$(VENV)-floor CONSTRAINTS=tests/floor.txt

lint: $(VENV)/.lint
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyrefly check

# One stamp an extra, renewed when pyproject.toml changes.
$(VENV)/.%: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check \
		-c $(CONSTRAINTS) -e ".[$*]"
	touch $@
