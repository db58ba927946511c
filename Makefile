# Every target that needs the environment makes it first: a virtual environment in .venv with locked versions.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: help demo test lint bench lock clean
help:  ## show this list
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 10

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Diptych needs Python 3.11 or newer; this is " + sys.version.split()[0] + ". Try: make PYTHON=python3.12")'
	@echo "Installing Diptych and its locked dependencies into .venv (once, a few minutes) ..."
	@$(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check torch==$$(sed -n 's/^torch==//p' constraints.txt)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test,dev,track]'
	@touch $(STAMP)

demo: $(STAMP)  ## the whole method on the packaged model: warm-up, GRPO, evaluation, report (about 15 minutes)
	@$(BIN)/diptych demo $(ARGS)

test: $(STAMP)  ## all tests that need no GPU
	@echo "Running the tests on two workers ..."
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m "not gpu" $(ARGS)

lint: $(STAMP)  ## style, types and the house plan
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports --no-cache

bench: $(STAMP)  ## every benchmark at its quick size
	@for script in benchmarks/*.py; do echo "== $$script"; $(BIN)/python $$script --quick || exit 1; done

lock: $(STAMP)  ## write constraints.txt from what is installed
	@{ sed -n '/^#/p' constraints.txt; $(BIN)/python -m pip freeze --exclude-editable --exclude diptych | sed 's/+cpu//' | grep -v ' @ '; } > .constraints.new
	@mv .constraints.new constraints.txt

clean:  ## remove the environment and caches (runs are kept)
	@rm -rf .venv .pytest_cache .ruff_cache .mypy_cache
