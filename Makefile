# `make` lists the targets. Each sets up .venv by itself.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
WORKERS ?= 2
SOAK_MINUTES ?= 30
export HF_HUB_OFFLINE ?= 1

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-all test-oldest lint types bench soak docs clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 20

setup: $(READY)  ## make the environment (.venv)

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

demo: $(READY)  ## the whole story in under 3 minutes, nothing downloaded
	$(BIN)/ghoststore demo --out ghoststore-demo $(if $(wildcard ghoststore-demo/demo.json),--overwrite)

# A file's tests on one worker, so that what they share is built once; the files in the order of tests/conftest.py, not
# those of few tests last, among which are the longest.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

test: $(READY)  ## run the fast tests: every kind of fault, in about 6 minutes on 2 cores
	$(PYTEST) -m "not slow"

test-all: $(READY)  ## run all tests: every case of every grid, every moment of a kill
	$(PYTEST)

# The least of each range in pyproject.toml, so that what it admits is what was tried.
OLDEST := .venv-oldest

test-oldest:  ## run the fast tests with the oldest versions that pyproject.toml admits
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet uv
	$(OLDEST)/bin/uv pip compile --quiet --resolution lowest-direct --extra dev --output-file $(OLDEST)/versions.txt \
		pyproject.toml
	$(OLDEST)/bin/python -m pip install --quiet --requirement $(OLDEST)/versions.txt --editable .
	$(MAKE) test VENV=$(OLDEST) READY=

lint: $(READY)  ## style, types, and the order of imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# Not --quiet: it hides warnings from --strict.
docs: $(READY)  ## write the generated pages again, and build the site (build/site/index.html)
	$(BIN)/python -m ghoststore.cli.reference docs/cli.md
	$(BIN)/python docs/site/reference.py docs/api
	$(BIN)/python docs/site/comparison.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

ghoststore-demo/demo.json: $(READY)
	$(MAKE) demo

soak: $(READY)  ## faults of all kinds for SOAK_MINUTES (30): the table promise × tried × lost
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.faults.soak --minutes $(SOAK_MINUTES) --workers $(WORKERS) \
		$(if $(SOAK_SEED),--seed $(SOAK_SEED)) $(if $(SOAK_DOCS),--docs docs/reliability.md)

bench: ghoststore-demo/demo.json  ## small benchmarks of build and search, on the demo's corpus
	$(BIN)/python benchmarks/build.py --architecture small --length 64 --data ghoststore-demo/train.jsonl \
		--tokenizer ghoststore-demo/tokenizer --out benchmarks/results
	$(BIN)/python benchmarks/search.py --out benchmarks/results

clean:  ## remove the environment and what the targets made
	rm -rf $(VENV) $(OLDEST) build ghoststore-demo .pytest_cache .mypy_cache .ruff_cache
