# `make` lists the targets. Everything runs in .venv, which the targets make themselves.
PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3.13 || echo python3)
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready

.DEFAULT_GOAL := help
.PHONY: help demo test lint typecheck bench clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(READY) ## Score 4,000 real pictures end to end and show the report
	$(BIN)/score demo

test: $(READY) ## Run all tests, whole nights and faults included
	$(BIN)/python -m pytest

lint: $(READY) ## Check style, layers and spelling
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/codespell

typecheck: $(READY) ## Check types, strictly
	$(BIN)/mypy

bench: $(READY) ## Measure the demo job: three runs with the engine cached, medians
	$(BIN)/python benchmarks/demo_rate.py

clean: ## Remove the environment and what the demo made
	rm -rf $(VENV) nightscore-demo
