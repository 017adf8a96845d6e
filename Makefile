.DEFAULT_GOAL := help
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
MAKEFLAGS += --no-print-directory

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --no-input -qq
# Stubs are generated under a virtual path: a top-level package `proto` would collide with proto-plus.
PROTOS = $(patsubst proto/%,services/wire/%,$(wildcard proto/*.proto))
PROTOC = $(BIN)/python -m grpc_tools.protoc -Iservices/wire=proto

# Tests start many processes: one thread each, unless asked otherwise.
export OMP_NUM_THREADS ?= 1

.PHONY: help setup demo test check format lint types imports stubs proto bench soak wheel screenshots clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

setup: $(VENV)/.ready ## make .venv with everything in it; quick when nothing changed

# torch comes first and alone: deepspeed is built from source and asks the installed torch what to build.
$(VENV)/.ready: pyproject.toml infra/constraints.txt | $(BIN)/python
	@echo "setup: torch"
	@$(PIP) install -c infra/constraints.txt torch
	@echo "setup: build tools"
	@$(PIP) install -c infra/constraints.txt setuptools wheel ninja
	@echo "setup: slipstream and its dependencies (a few minutes the first time)"
	@$(PIP) install -c infra/constraints.txt --no-build-isolation --editable '.[dev]'
	@touch $@
	@echo "setup: done, see $(BIN)/slipstream --help"

$(BIN)/python:
	@for name in "$(PYTHON)" python3.13 python3.12 python3.11; do \
	  if "$$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
	    echo "setup: $(VENV) with $$("$$name" --version)"; \
	    "$$name" -m venv $(VENV) && exit 0; \
	    rm -rf $(VENV); \
	    echo "setup: $$name cannot make a virtual environment; on Debian and Ubuntu install python3-venv" >&2; \
	    exit 1; \
	  fi; \
	done; \
	echo "setup: no Python 3.11 or newer among $(PYTHON), python3.13, python3.12, python3.11;" \
	     "name one with make setup PYTHON=/path/to/python" >&2; \
	exit 1

demo: setup ## distil a drafter from streamed features on this machine; ARGS="--steps 20" and the like
	@$(BIN)/slipstream demo $(ARGS)

test: setup ## run every test; ARGS="-k recipe" and the like
	@$(BIN)/python -m pytest $(ARGS)

check: setup format lint types imports stubs ## formatting, lint, types, import direction, generated stubs

format: setup
	@echo "check: format"
	@$(BIN)/ruff format --check .

lint: setup
	@echo "check: lint"
	@$(BIN)/ruff check .

types: setup
	@echo "check: types"
	@$(BIN)/mypy

imports: setup
	@echo "check: imports"
	@$(BIN)/python -m pytest tests/unit/test_imports.py

stubs: setup
	@echo "check: stubs"
	@rm -rf build/stubs && mkdir -p build/stubs
	@$(PROTOC) --python_out=build/stubs --grpc_python_out=build/stubs --pyi_out=build/stubs $(PROTOS)
	@diff -r -x __init__.py -x __pycache__ build/stubs/services/wire services/wire \
	  || { echo "services/wire differs from proto/: run make proto" >&2; exit 1; }

proto: setup ## generate services/wire from proto/
	@$(PROTOC) --python_out=. --grpc_python_out=. --pyi_out=. $(PROTOS)

bench: setup ## run a benchmark; ARGS="run --json" and the like
	@$(BIN)/slipstream bench $(ARGS)

soak: setup ## kill random parts of a real run for a while and see that nothing is lost; ARGS="--minutes 15"
	@$(BIN)/python infra/soak.py $(ARGS)

wheel: setup ## build the wheel into dist/
	@rm -rf build/lib build/bdist.*
	@$(BIN)/python -m build --wheel --no-isolation

screenshots: setup ## pictures of the dashboard for docs/images; ARGS="path/to/output_dir" of a finished run
	@$(BIN)/python infra/screenshots.py $(ARGS)

clean: ## remove what builds and checks left behind; keeps .venv, runs/ and trained models
	@rm -rf dist build/lib build/bdist.* build/stubs *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache
	@find $(wildcard drafters evaluation infra services tests trainer) -name __pycache__ -type d -prune -exec rm -rf {} +
