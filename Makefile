# The commands people run. `make train` and `make test` set up what they need.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
CONFIG ?= configs/digits.yaml

export RAY_AUTH_MODE ?= token
unexport PYTHONDONTWRITEBYTECODE  # without bytecode every process of a Ray compiles Esper anew

.PHONY: help install train test test-unit test-integration test-ray check format soak clean

help:            ## what can be done here
	@grep -E '^[a-z-]+: .*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## */  make \1\t/' | expand -t 20

install: $(STAMP)  ## make .venv and install Esper with its development tools

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' \
	  || { echo "Esper needs Python 3.11, 3.12 or 3.13; found $$($(PYTHON) --version). Run: make install PYTHON=python3.11"; exit 2; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@touch $@

train: $(STAMP)  ## train and grow a small network on the digits, then print where its report lies
	$(BIN)/esper train $(CONFIG)

test: test-unit test-integration test-ray  ## the whole test suite, with a coverage report

test-unit: $(STAMP)  ## the library's tests; Ray is hidden from them
	@$(BIN)/coverage erase
	ESPER_TEST_WITHOUT_RAY=1 $(BIN)/python -m pytest -n 2 --dist worksteal --cov --cov-report= tests/unit -m "not soak"

test-integration: $(STAMP)  ## the longer tests that start no Ray, two files at a time
	$(BIN)/python -m pytest -n 2 --dist loadfile --cov --cov-append --cov-report= tests/architecture tests/actors tests/integration tests/faults -m "not ray and not soak"

test-ray: $(STAMP)  ## the tests that start Ray
	$(BIN)/coverage run -m pytest tests/architecture tests/actors tests/integration tests/faults -m "ray and not soak"
	@$(BIN)/coverage combine --quiet --append && $(BIN)/coverage report

soak: $(STAMP)  ## the long tests; the kills keep their results in ESPER_SOAK_DIR (.soak) and go on there
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[fuzz]" \
	  || echo "atheris (the extra fuzz) cannot be installed here: its soak is skipped"
	$(BIN)/python -m pytest tests -m soak

check: $(STAMP)  ## lint, types, and who may import whom
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports

format: $(STAMP)  ## rewrite the code in the house format
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:           ## remove what was built, .venv included
	rm -rf .venv build *.egg-info .pytest_cache .ruff_cache .hypothesis .coverage .coverage.* htmlcov
