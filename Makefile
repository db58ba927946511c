# Every target that needs the environment makes it first: a virtual environment in .venv with locked versions.
PYTHON ?= python3
WORKERS ?= 2
BIN := .venv/bin
STAMP := .venv/.installed
# A lock line that is used here, e.g. $(call locked,pip) -> pip==26.3
locked = $(shell grep -i '^$(1)==' constraints.txt)
define check_python
@$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "Diptych needs Python 3.11 or newer; this is " + sys.version.split()[0] + ". Try: make PYTHON=python3.12 ...")'
endef

.PHONY: help install demo test lint docs bench lock clean
help:  ## show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(STAMP): pyproject.toml constraints.txt
	$(check_python)
	@echo "Installing Diptych and its locked dependencies into .venv (once; a few minutes) ..."
	@$(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt pip hatchling editables
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-build-isolation -e '.[test,dev,docs,track,gpu]'
	@touch $(STAMP)

install: $(STAMP)  ## the environment in .venv, with locked versions (every target makes it when it is needed)

demo: $(STAMP)  ## the whole method on the packaged model: warm-up, GRPO, evaluation, report (ARGS="--seed 1" is passed on)
	@echo "Running the demo (about 5 minutes on 2 cores; the same command resumes it) ..."
	@$(BIN)/diptych demo $(ARGS)

test: $(STAMP)  ## all tests that need no GPU (ARGS="-k losses" is passed on)
	@echo "Running the tests on $(WORKERS) workers, one thread each ..."
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) -m "not gpu" $(ARGS)

lint: $(STAMP)  ## style, types and the layers of the code
	@echo "Checking style (ruff), types (mypy) and the layers (import-linter) ..."
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports --no-cache

docs: $(STAMP)  ## the documentation as a site in build/site; a broken link or anchor is an error
	@$(BIN)/python scripts/docs.py

bench: $(STAMP)  ## every script in benchmarks/ at its quick size
	@echo "Running the benchmarks at their quick size ..."
	@for script in $(sort $(wildcard benchmarks/[a-z]*.py)); do echo "== $$script"; $(BIN)/python $$script --quick $(ARGS) || exit 1; done

lock:  ## write constraints.txt anew: the newest versions that pyproject.toml admits, torch as it is locked now
	$(check_python)
	@echo "Resolving in a fresh environment, .venv-lock (a few minutes) ..."
	@$(PYTHON) -m venv --clear .venv-lock
	@.venv-lock/bin/python -m pip install --quiet --disable-pip-version-check --upgrade pip
	@.venv-lock/bin/python -m pip install --quiet $(call locked,torch) hatchling editables -e '.[test,dev,docs,track,gpu]'
	@{ grep '^#' constraints.txt; .venv-lock/bin/python -m pip freeze --all --exclude-editable > .venv-lock/frozen && \
		sed 's/+[a-z0-9.]*$$//' .venv-lock/frozen | grep -Eiv '^(nvidia|cuda|triton)'; } > .venv-lock/constraints.txt
	@mv .venv-lock/constraints.txt constraints.txt
	@rm -rf .venv-lock

clean:  ## remove the environment, builds and caches (runs/ is kept)
	@echo "Removing .venv, builds and caches ..."
	@rm -rf .venv .venv-lock build dist .pytest_cache .ruff_cache .mypy_cache .import_linter_cache
	@find src tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true
