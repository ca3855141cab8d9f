# make, or make help: what there is.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
PORT ?= 5000
ARGS ?=
RUN = .venv/bin/python -m
PARALLEL = -n auto --dist loadfile --no-loadscope-reorder
OUTCOMES = build/reliability.jsonl
CASES = build/cluster.jsonl

.DEFAULT_GOAL := help
.PHONY: help setup train evaluate test test-reliability test-cluster lint format types check bench ui notebooks docs wheel clean

help: ## this list
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-17s %s\n", $$1, $$2}'
	@echo '  ARGS="..." is passed on: make train ARGS="env=mt10 seed=3"'

.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(RUN) pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@touch $@

setup: .venv/.installed ## the virtual environment .venv with everything in it

train: setup ## train (ARGS: overrides; without any: the quickstart, minutes on two cores)
	$(RUN) softmod.train $(ARGS)

evaluate: setup ## evaluate a checkpoint (ARGS="checkpoint=runs/... video=true")
	$(RUN) softmod.evaluate $(ARGS)

test: setup ## the tests, on all cores (the minutes-long ones: make test-reliability)
	$(RUN) pytest $(PARALLEL) $(ARGS)

test-reliability: setup ## try all promises of docs/reliability.md in full and write them down there; most of an hour
	rm -f $(OUTCOMES)
	-$(RUN) pytest $(PARALLEL) -m "(bar or control or reliability) and not timed" --outcomes=$(OUTCOMES) $(ARGS)
	-$(RUN) pytest -m "(bar or control) and timed" --outcomes=$(OUTCOMES) $(ARGS)
	$(RUN) tests.reliability.table $(OUTCOMES) docs/reliability.md

test-cluster: setup ## try a real SLURM of two nodes and a server on PostgreSQL; a quarter of an hour
	rm -f $(CASES)
	-$(RUN) pytest -m cluster tests/cluster --outcomes=$(CASES) $(ARGS)
	$(RUN) tests.cluster.table $(CASES) docs/howto/cluster_cases.md

lint: setup ## the linter, and whether the formatter would change anything
	$(RUN) ruff check .
	$(RUN) ruff format --check .

format: setup ## let the formatter and the linter change what they can
	$(RUN) ruff format .
	$(RUN) ruff check --fix .

types: setup ## the type checker
	$(RUN) mypy

check: lint types test ## everything that a change has to pass

bench: setup ## the figures of the README's performance table, on this machine; leave it alone meanwhile
	$(RUN) pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[bench]" || echo "no EnvPool here"
	$(RUN) benchmarks $(ARGS)

ui: setup ## the dashboard on 127.0.0.1 (PORT=5000)
	$(RUN) softmod.ui port=$(PORT)

notebooks: setup ## execute the notebooks against the runs in this folder
	$(RUN) jupyter nbconvert --to notebook --execute --output-dir build/notebooks notebooks/*.ipynb

docs: setup ## the documentation site, in build/site (index.html opens in a browser)
	NO_MKDOCS_2_WARNING=1 $(RUN) mkdocs build --strict

wheel: setup ## dist/*.whl
	$(RUN) build --wheel --outdir dist

clean: ## remove the environment and caches; runs and the MLflow store stay
	rm -rf .venv build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
