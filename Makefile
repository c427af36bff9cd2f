# Everything a person or CI runs. `make run` serves the demo, `make test` runs all tests.
PYTHON ?= python3
VENV ?= .venv
HOST ?= 127.0.0.1
PORT ?= 8000

BIN = $(VENV)/bin
PIP_INSTALL = $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: run test check format mutants faults bench clean

run: $(VENV)/.run  ## Serve the embedded demo on HOST:PORT.
	$(BIN)/ram serve --demo --host $(HOST) --port $(PORT)

test: $(VENV)/.dev  ## All tests.
	$(BIN)/python -m pytest

check: $(VENV)/.dev  ## Lint, format, spelling, types, import layers.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell ram_core server tests benchmarks docs README.md CHANGELOG.md CONTRIBUTING.md
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/.dev  ## Rewrite the code as the linter wants it.
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

mutants: $(VENV)/.dev  ## Break the code on purpose, line by line, and see the tests fail.
	$(BIN)/python -m tests.mutants

faults: $(VENV)/.dev  ## Overload, faults and bad requests in full length, with a table of what they did.
	FULL_LENGTH=1 $(BIN)/python -m pytest tests/load tests/faults -s

bench: $(VENV)/.run  ## What the README of benchmarks/ claims, measured on this machine.
	$(BIN)/python -m benchmarks

clean:
	rm -rf $(VENV)

# Torch goes first and alone: asked for by another package, pip may take another build of it.
$(VENV)/.run: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed; name one with PYTHON=…" >&2; exit 1; }
	@echo "Installing into $(VENV) (some minutes, once) …"
	@$(PYTHON) -m venv $(VENV)
	@$(PIP_INSTALL) torch
	@$(PIP_INSTALL) --editable .
	@touch $@

$(VENV)/.dev: $(VENV)/.run
	@$(PIP_INSTALL) --editable '.[dev]'
	@touch $@
