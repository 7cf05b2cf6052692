# make demo       a small Mixture-of-Experts model, fine-tuned, saved, reloaded and merged
# make test       the test suite (transformers 5)
# make test-v4    the same suite on transformers 4
# make lint       ruff and mypy
# make docs       the documentation, into site/
# make bench      one block of experts against its peers, with a picture; the others: benchmarks/README.md
# make clean      remove the environments and everything built
#
# PYTHON     the interpreter the environments are made from; the pinned set needs 3.11 or newer
# PIP_ARGS   options for pip install, for example an index with CPU-only builds of torch
# PYTEST     options for pytest, for example PYTEST='-k merge -x'
# DEMO       options for the demo, for example DEMO='--steps 100'
# BENCH      options for the benchmark, for example BENCH='--tokens 512 4096', or BENCH='--peers' (benchmarks/peers.py)

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

PYTHON ?= python3
PIP_ARGS ?=
PYTEST ?=
DEMO ?=
BENCH ?=
WORKERS ?= 2
EXTRAS := test,cli,bnb,triton

VENV := .venv
VENV_V4 := .venv-v4
BIN := $(VENV)/bin
BIN_V4 := $(VENV_V4)/bin

# One thread a worker: pytest-xdist already uses the cores.
RUN_PYTEST = OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(1)/python -m pytest -n $(WORKERS) $(PYTEST)

.PHONY: help demo test test-v4 lint format docs bench clean

help:
	@sed -n 's/^# \(make [a-z]\)/  \1/p' Makefile

# make_env DIR CONSTRAINTS EXTRAS
define make_env
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(None if v >= (3, 11) else f"constraints.txt needs Python 3.11 or newer, {sys.executable} is {v[0]}.{v[1]}: make PYTHON=python3.11")'
	test -x $(1)/bin/python || $(PYTHON) -m venv $(1)
	$(1)/bin/python -m pip install --disable-pip-version-check $(PIP_ARGS) -c $(2) -e '.[$(3)]'
	@touch $@
endef

$(VENV)/.installed: pyproject.toml constraints.txt
	$(call make_env,$(VENV),constraints.txt,$(EXTRAS))

$(VENV)/.installed-docs: $(VENV)/.installed
	$(call make_env,$(VENV),constraints.txt,docs)

$(VENV_V4)/.installed: pyproject.toml constraints-v4.txt
	$(call make_env,$(VENV_V4),constraints-v4.txt,$(EXTRAS))

demo: $(VENV)/.installed
	$(BIN)/python examples/quickstart.py $(DEMO)

test: $(VENV)/.installed
	$(call RUN_PYTEST,$(BIN))

test-v4: $(VENV_V4)/.installed
	$(call RUN_PYTEST,$(BIN_V4))

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy peft_moe

format: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(VENV)/.installed-docs
	$(BIN)/mkdocs build --strict

bench: $(VENV)/.installed
	mkdir -p benchmarks/out
	@touch benchmarks/out/.started
	$(BIN)/python benchmarks/block.py --out benchmarks/out/block.json $(BENCH)
	@if [ benchmarks/out/block.json -nt benchmarks/out/.started ]; then \
	  $(BIN)/python benchmarks/plot.py benchmarks/out/block.json benchmarks/out/block.png; \
	else echo 'No picture: this run did not write benchmarks/out/block.json. To draw another file: benchmarks/plot.py'; fi

clean:
	rm -rf $(VENV) $(VENV_V4) site quickstart_out build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
