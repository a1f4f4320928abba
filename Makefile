# The two commands of the README: `make demo` and `make test`. Each makes .venv first when it has to.
# Options go through ARGS:  make demo ARGS="--steps 10"   make test ARGS="-k lockstep -x"
#
# PYTHON  the interpreter that .venv is made with, 3.11 or newer (default: the first one found)
# VENV    the environment's folder (default: .venv)

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

VENV ?= .venv
BIN := $(VENV)/bin
# Changes when the requirements do, and then the environment is brought up to date.
READY := $(VENV)/.ready
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
IMAGE ?= hacrl-exchange
ARGS ?=

export VENV
# Threads of one process per core; several processes run at once here.
export OMP_NUM_THREADS ?= 1

.PHONY: help demo test check lint format protos bench chaos docker clean

help: ## print this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' Makefile

demo: $(READY) ## broker, workers and two agents that teach each other; writes runs/demo
	$(BIN)/hacrl demo $(ARGS)

test: $(READY) ## unit and integration tests
	$(BIN)/python -m pytest -n 2 $(ARGS)

check: $(READY) ## every static check: ruff, mypy, import rules, generated code, protos
	scripts/check $(ARGS)

lint: $(READY) ## ruff alone
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

format: $(READY) ## let ruff rewrite what it can
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

protos: $(READY) ## regenerate hacrl_exchange/_pb from proto/
	$(BIN)/python scripts/gen_protos.py

bench: $(READY) ## throughput of the exchange, each role in its own process
	$(BIN)/hacrl bench exchange $(ARGS)

chaos: $(READY) ## the long suites that kill processes
	$(BIN)/python -m pytest -m chaos $(ARGS)

docker: ## the broker's image and the agents' image
	docker build --target broker --tag $(IMAGE):broker .
	docker build --target agent --tag $(IMAGE):agent .

clean: ## remove .venv, caches and what runs left behind
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache runs

$(READY): pyproject.toml constraints.txt
	@if [[ -z "$(PYTHON)" ]]; then \
		echo "no Python 3.11 or newer with the venv module was found; name one: make PYTHON=/path/to/python3" >&2; \
		exit 1; fi
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || { \
		echo "making $(VENV) with $$($(PYTHON) --version)"; $(PYTHON) -m venv $(VENV); }
	@echo "installing hacrl-exchange and what it needs into $(VENV) (the first time takes minutes; torch is large)"
	@$(BIN)/python -m pip install -qq --constraint constraints.txt --editable '.[agents,verifiers,dev]'
	@touch $@
