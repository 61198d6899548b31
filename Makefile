# `make` lists the targets. Everything runs in .venv, which the targets make themselves.
PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3.13 || echo python3)
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready

.DEFAULT_GOAL := help
.PHONY: help demo test lint typecheck bench bench-scaling torture clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(READY) ## Score 4,000 real pictures end to end and show the report
	$(BIN)/score demo

# Two processes: many tests wait for servers and nights. A file's tests stay in one process.
test: $(READY) ## Run all tests, whole nights and faults included
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

lint: $(READY) ## Check style, layers and spelling
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/codespell

typecheck: $(READY) ## Check types, strictly
	$(BIN)/mypy

# What the two below take: ROUNDS, PHOTOS (a folder with labels.csv), BENCH_WORK and BENCH_VENVS (folders
# of what is made once), ROWS (a smoke test); bench WORKLOADS, PEERS and PUBLISH; bench-scaling PARTS.
option = $(if $($(1)),--$(2) $($(1)))
BENCH_OPTIONS = $(call option,ROUNDS,rounds) $(call option,ROWS,rows) $(call option,PHOTOS,photos) \
	$(call option,BENCH_WORK,work) $(call option,BENCH_VENVS,venvs)

bench: $(READY) ## Measure peers and product side by side (40 minutes): tables, plots, README
	$(BIN)/python -m benchmarks.compare $(BENCH_OPTIONS) \
		$(call option,WORKLOADS,workloads) $(call option,PEERS,peers) $(if $(PUBLISH),--publish)

bench-scaling: $(READY) ## Measure the product's memory and speed over rows and lanes
	$(BIN)/python -m benchmarks.scaling $(BENCH_OPTIONS) $(call option,PARTS,parts)

torture: $(READY) ## Kill 2,000 nights, crash one at every operation, on a bucket too (an hour)
	TORTURE_KILLS=2000 $(BIN)/python -m pytest tests/scenarios/test_crash_points.py tests/scenarios/test_state_machine.py tests/scenarios/test_storage_faults.py

clean: ## Remove the environment and what the demo made
	rm -rf $(VENV) nightscore-demo
