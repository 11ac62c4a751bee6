# Two commands for newcomers: `make quickstart` and `make test`. `make help` lists the rest.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

FF := target/release/ff
PYTHON := .venv/bin/python
# Arguments for quickstart, sim, ...: make quickstart ARGS=--keep
ARGS ?=
SEEDS ?= 2000
FROM ?= 0
# For faults.
SECONDS ?= 600
SEED ?= 1

.PHONY: help
help: ## List the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | column -t -s "$$(printf '\t')"

## ---- see it ----

.PHONY: quickstart
quickstart: setup-run torch release python ## The whole stack trains a PyTorch model, and survives faults
	$(FF) quickstart $(ARGS)

.PHONY: native
native: setup-run release digits ## The same in under a minute, with a built-in model instead of PyTorch
	$(FF) quickstart --native $(ARGS)

.PHONY: install
install: setup-run release ## Install ff and its man pages and completion under /usr/local
	install -D $(FF) /usr/local/bin/ff
	$(FF) man /usr/local/share/man/man1
	install -d /usr/local/share/bash-completion/completions
	$(FF) completion bash > /usr/local/share/bash-completion/completions/ff

## ---- build ----

.PHONY: setup-build setup-run torch
setup-build:
	@deploy/setup.sh build
setup-run:
	@deploy/setup.sh build run
torch:
	@deploy/setup.sh torch

.PHONY: release
release: setup-build ## Build ff and the C library in release mode
	cargo build --release -p firefly-cli -p firefly-reduce-ffi

.PHONY: python
python: ## Build and install the firefly Python package into .venv (release library)
	FIREFLY_LIB_DIR=$(CURDIR)/target/release $(PYTHON) -m pip install --quiet --disable-pip-version-check \
		--no-build-isolation --no-deps ./python

.PHONY: digits
digits: ## Fetch the digits for the native quickstart
	@deploy/digits/fetch.sh .cache

## ---- test ----

.PHONY: test
test: ## Everything that must pass: format, lint, unit, simulation, Python, end to end
	@tests/run.sh

.PHONY: lint
lint: setup-build ## Format and lint
	cargo fmt --all --check
	cargo clippy --workspace --all-targets -- -D warnings

.PHONY: sim
sim: setup-build ## More simulation: make sim SEEDS=20000 FROM=7000
	FIREFLY_SIM_SEEDS=$(SEEDS) FIREFLY_SIM_FROM=$(FROM) cargo test --release -p firefly-sim -- --nocapture

.PHONY: faults
faults: setup-build ## Real processes under faults, with a history checker: make faults SECONDS=600 SEED=7
	cargo build -p firefly-cli
	FIREFLY_FAULTS_SECONDS=$(SECONDS) FIREFLY_FAULTS_SEED=$(SEED) \
		cargo test -p firefly-tests --test nemesis -- --nocapture --test-threads=1

.PHONY: rdma
rdma: setup-run ## fs3 and collectives over real verbs, in virtual machines with Soft-RoCE
	tests/rdma-vm/selftest.sh
	tests/rdma-vm/run.sh

.PHONY: torch-suite
torch-suite: torch release python ## torch's own distributed tests on ffreduce, at 2, 3 and 4 ranks, twice
	$(PYTHON) python/suite/torch_suite.py $(ARGS)

.PHONY: kill-matrix
kill-matrix: setup-build ## Deaths and stops of ranks before, in and after every collective: all of them
	FIREFLY_KILL_MATRIX=all cargo test --release -p firefly-reduce --test kill_matrix -- --nocapture

.PHONY: test-all
test-all: test sim faults rdma ## The long runs too

.PHONY: bench
bench: setup-run release python digits ## Figures, as ratios against peers in the same run
	@deploy/setup.sh bench
	tests/bench/run.sh $(FF) $(PYTHON)

.PHONY: clean
clean: ## Remove build output (keeps .venv)
	cargo clean
	rm -rf .cache python/build
