# Each target does all its own set-up in .venv; a second run reuses it.
# torch goes first and from the constraints file: anything else that wants it then finds it there.

PYTHON ?= python3
BIN := .venv/bin
WHAT := $(shell cat pyproject.toml constraints.txt instrument/measure/native/engine.c | cksum | cut -d' ' -f1)
STAMP := .venv/.ready-$(WHAT)
TRAINERS := .venv-integrations
TRAINERS_STAMP := $(TRAINERS)/.ready-$(WHAT)

.PHONY: demo test test-integrations lint bench clean

demo: $(STAMP)
	$(BIN)/python examples/char_gpt.py

test: $(STAMP)
	$(BIN)/python -m pytest

# Real trainers want a hundred megabytes that nobody else needs; nothing is downloaded once they are installed.
test-integrations: $(TRAINERS_STAMP)
	HF_HUB_OFFLINE=1 $(TRAINERS)/bin/python -m pytest tests/integrations

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(STAMP)
	$(BIN)/python -m tests.benchmarks

$(STAMP):
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[test,lint]"
	rm -f .venv/.ready-*
	touch $@

$(TRAINERS_STAMP):
	test -x $(TRAINERS)/bin/python || $(PYTHON) -m venv $(TRAINERS)
	$(TRAINERS)/bin/python -m pip install --quiet --constraint constraints.txt torch
	$(TRAINERS)/bin/python -m pip install --quiet --constraint constraints.txt --editable ".[test,integrations]"
	rm -f $(TRAINERS)/.ready-*
	touch $@

clean:
	rm -rf .venv $(TRAINERS) .mypy_cache .pytest_cache .ruff_cache .hypothesis build dist
