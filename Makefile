# Everything a developer does. `make demo` and `make test` need nothing but python3 (3.10 to 3.13) and set up .venv.

PYTHON ?= python3
VENV   := .venv
STAMP  := $(VENV)/.installed
PIP    := $(VENV)/bin/python -m pip

.DEFAULT_GOAL := help
.PHONY: help venv demo test test-all lint types clean

help:  ## show this list
	@grep -hE '^[a-z-]+:.*## ' $(firstword $(MAKEFILE_LIST)) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 18

venv: $(STAMP)  ## make .venv with everything that the demo and the tests need

# torch first and exactly: a looser requirement may bring another build with gigabytes of packages.
$(STAMP): pyproject.toml constraints.txt CMakeLists.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' \
	  || { echo "$(PYTHON) is not supported: 3.10 to 3.13 is needed. Name another: make PYTHON=python3.12 ..."; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(PIP) install -qq -c constraints.txt "$$(grep '^torch==' constraints.txt)"
	$(PIP) install -qq -c constraints.txt -e '.[cpu,export,tensorrt-rtx,dev]'
	@touch $(STAMP)

demo: venv  ## the whole chain on a small random model: checkpoint, export, picture, parity
	$(VENV)/bin/magicface-rt demo

test: lint types  ## lint, types and the quick tests
	$(VENV)/bin/python -m pytest -q -m "not slow and not full and not gpu"

test-all: lint types  ## all tests that need no GPU: every recording, the full-size network, the slow properties
	$(VENV)/bin/python -m pytest -q -m "not gpu"

lint: venv  ## ruff
	$(VENV)/bin/ruff check .

types: venv  ## mypy, strict on the runtime
	$(VENV)/bin/mypy

clean:  ## remove .venv and everything that was made here
	rm -rf $(VENV) build dist demo-out .cache .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
