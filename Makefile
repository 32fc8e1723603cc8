# On a fresh machine with Python >= 3.11 and make: `make demo`, `make test`.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
WORK ?= runs/world2
VIDEOS ?= 1000
RGB_CLIPS ?= 12000
FLOW_CLIPS ?= 8000
VALIDATION_CLIPS ?= 760
TABLES ?= 1
SEEDS ?= 5
ABLATION_SEEDS ?= 3
SET ?=

.PHONY: help install demo test lint types bench floors world clean
.DELETE_ON_ERROR:

help:
	@echo "make demo   install into .venv and ground a sentence in the example clip"
	@echo "make test   install and run all tests"
	@echo "make lint   ruff;  make types  strict mypy"
	@echo "make bench  all benchmarks that need no other code;  make floors  the quick ones"
	@echo "make world  the whole chain: render, pretrain, extract, probe, every row of TABLES"

install: $(STAMP)

$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "mmdist needs Python 3.11 or newer; try: make PYTHON=python3.12 ..."; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	@touch $@

demo: $(STAMP)
	$(BIN)/python examples/demo.py

test: $(STAMP)
	$(BIN)/python -m pytest

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)
	$(BIN)/mypy

bench: $(STAMP)
	$(BIN)/python benchmarks/check.py --all

# Ratios of the quick benchmarks against benchmarks/floors.json; under a minute on two idle cores.
floors: $(STAMP)
	$(BIN)/python benchmarks/check.py

# Every step resumes a killed run; delete $(WORK) to start again. SET: settings of every row, like
# SET="epochs=1 hidden=32".
world: $(STAMP)
	WORK=$(WORK) VIDEOS=$(VIDEOS) RGB_CLIPS=$(RGB_CLIPS) FLOW_CLIPS=$(FLOW_CLIPS) \
	  VALIDATION_CLIPS=$(VALIDATION_CLIPS) TABLES=$(TABLES) SEEDS=$(SEEDS) \
	  ABLATION_SEEDS=$(ABLATION_SEEDS) SET="$(SET)" BIN=$(BIN) bash world/chain.sh

clean:
	rm -rf .venv build dist .mypy_cache .pytest_cache .ruff_cache
