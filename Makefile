# SoftTDX. `make demo` and `make test` set everything up on a machine with Python >= 3.11, a C compiler and Rust.
# All paths are relative, so that a checkout may lie in a path with spaces.

PYTHON ?= python3
EXTRAS ?= dev# of pyproject.toml; dev,ray also runs the tests of campaigns on Ray
VENV := .venv
RUN := $(VENV)/bin/python
CC ?= cc
NATIVE := $(shell find native/src native/guests native/build.rs native/Cargo.toml -type f 2>/dev/null)

MODULE := $(shell find src/softtdx/module -name '*.py' 2>/dev/null)

.PHONY: help demo test build check lint fmt types imports cargo-test nightly bench clean
.DEFAULT_GOAL := help

help: ## Show the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 14

# --- set-up

$(VENV)/.tools: Makefile
	@command -v $(PYTHON) >/dev/null 2>&1 || { echo "softtdx: Python is missing ($(PYTHON)); install Python 3.11 or newer" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "softtdx: $(PYTHON) is too old; Python 3.11 or newer is needed" >&2; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { echo "softtdx: Python's venv module is missing; install it (Debian: python3-venv)" >&2; exit 1; }
	@command -v $(CC) >/dev/null 2>&1 || { echo "softtdx: a C compiler is missing ($(CC)); install gcc or clang" >&2; exit 1; }
	@command -v cargo >/dev/null 2>&1 || { echo "softtdx: Rust is missing (cargo); install it with rustup or your distribution" >&2; exit 1; }
	@test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	@touch $@

# The editable install builds the native core (release) and the guests that ship with it.
$(VENV)/.installed: $(VENV)/.tools pyproject.toml $(NATIVE)
	@echo "softtdx: building (a minute or two, once)"
	@$(RUN) -m pip install --quiet --disable-pip-version-check --editable '.[$(EXTRAS)]'
	@touch $@

# The module image is signed anew when a source of the module changed.
$(VENV)/.module: $(VENV)/.installed $(MODULE)
	@$(RUN) -m softtdx.seamldr --quiet
	@touch $@

build: $(VENV)/.module ## Make the environment, build the native core and the signed module image

# --- the two commands of the README

demo: build ## Run the main job: a trust domain runs and proves itself
	@$(RUN) -m softtdx demo

test: build ## Run the tests
	@$(RUN) -m pytest -q $(PYTEST_ARGS)

# --- checks

check: lint types imports cargo-test test ## All that CI checks

lint: build ## Lint and formatting, Python and Rust
	@$(RUN) -m ruff check src tests
	@$(RUN) -m ruff format --check src tests
	@cargo fmt --manifest-path native/Cargo.toml --check
	@cargo clippy --quiet --manifest-path native/Cargo.toml --all-targets --features python -- -D warnings

fmt: build ## Format the sources
	@$(RUN) -m ruff check --fix src tests
	@$(RUN) -m ruff format src tests
	@cargo fmt --manifest-path native/Cargo.toml

types: build ## Type check
	@$(RUN) -m mypy

imports: build ## The house's floors and walls
	@$(VENV)/bin/python -c 'import sys; from importlinter.cli import lint_imports_command; sys.exit(lint_imports_command())'

cargo-test: build ## Tests of the native core
	@cargo test --quiet --manifest-path native/Cargo.toml --release

nightly: build ## Long campaigns (hours)
	@$(RUN) -m pytest -q -m nightly --override-ini 'addopts=--strict-markers --strict-config -ra' --timeout 36000 tests
	@cargo test --quiet --manifest-path native/Cargo.toml --release -- --ignored

bench: build ## Measure
	@$(RUN) -m softtdx bench

clean: ## Remove everything that was built
	rm -rf $(VENV) native/target build dist
