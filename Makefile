# Every target works on a fresh machine: it makes its own environment in .venv*, once,
# and installs what it needs there.
PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= /dev/null
BIN := $(VENV)/bin
# Those of them that this machine has.
PYTHONS ?= python3.11 python3.12 python3.13 python3.14
AWAY := $(abspath build/away)

.PHONY: demo notebooks test test-wheel test-floor test-matrix test-nightly lint
.PRECIOUS: $(VENV)/.%
.DELETE_ON_ERROR:

demo: $(VENV)/.demo
	$(BIN)/python -m benchmarks demo

# The notebooks are made from their scripts, and keep what they print and draw.
notebooks: $(VENV)/.notebooks
	cd notebooks && $(abspath $(BIN))/jupytext --to ipynb --execute *.py

# The notebooks run, too, at a small size.
test: $(VENV)/.test
	MADAX_SMOKE=1 $(BIN)/python -m pytest -n auto --nbmake tests madax notebooks/*.ipynb

# The wheel as users get it, with no source of the library in reach.
test-wheel: VENV := .venv-wheel
test-wheel:
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	rm -rf build/wheel $(AWAY)
	$(BIN)/python -m pip wheel --quiet --disable-pip-version-check \
		--no-deps --wheel-dir build/wheel .
	$(BIN)/python -m pip install --quiet --disable-pip-version-check \
		-c $(CONSTRAINTS) --force-reinstall --no-deps build/wheel/*.whl
	$(BIN)/python -m pip install --quiet --disable-pip-version-check \
		-c $(CONSTRAINTS) "$$(echo build/wheel/*.whl)[test]"
	mkdir -p $(AWAY)
	cp -r tests benchmarks notebooks README.md pyproject.toml $(AWAY)
	cd $(AWAY) && $(abspath $(BIN))/python -m pytest -n auto --pyargs tests madax

# The oldest JAX, optax and Flax that pyproject.toml allows, under the wheel.
test-floor:
	$(MAKE) test-wheel VENV=.venv-floor CONSTRAINTS=tests/floor.txt

# The newest versions under every Python at hand, the floor, and the wheel.
test-matrix: test-floor test-wheel
	set -e; for python in $(PYTHONS); do \
		if $$python --version 2> /dev/null; then \
			$(MAKE) test PYTHON=$$python VENV=.venv-$$python; \
		fi; \
	done

# Many more examples of random trees, formats and hyperparameters.
test-nightly: $(VENV)/.test
	$(BIN)/python -m pytest -n auto --hypothesis-profile nightly tests/test_fuzz.py
	XLA_FLAGS=--xla_force_host_platform_device_count=8 JAX_PLATFORMS=cpu \
		$(BIN)/python -m pytest --hypothesis-profile nightly tests/test_fuzz_meshes.py

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
