# make demo: set up and run the main job.   make test: lint, types, the whole CPU suite.
PYTHON ?= python3.11
VENV := .venv
STAMP := $(VENV)/.installed
DEV := $(VENV)/.installed-dev
DOCS := $(VENV)/.installed-docs
PIP_FLAGS ?=
DEMO := sudoku-mini
SEED := 0

.PHONY: demo test check lint types unit integration bench browser docs pictures clean

demo: $(STAMP)
	$(VENV)/bin/unmaskrl train $(DEMO) run.seed=$(SEED) --force

test: lint types unit integration

check: lint types unit

lint: $(DEV)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/codespell src tests docs examples README.md CHANGELOG.md dev

types: $(DEV)
	$(VENV)/bin/pyright

unit: $(DEV)
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest tests/unit tests/contract tests/repo -n 2

integration: $(DEV)
	OMP_NUM_THREADS=1 UNMASKRL_CHECK_SHAPES=0 $(VENV)/bin/python -m pytest tests/integration -n 2 --dist worksteal

docs: $(DOCS)
	$(VENV)/bin/python dev/pages.py --check
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict --quiet
	@echo "build/site/index.html"

bench: $(STAMP)
	$(VENV)/bin/python -m benchmarks.speed --json benchmarks/cpu.json

# report, comparison and site in a real headless Chromium; skipped where there is none. Pictures: build/browser/
browser: $(DEV) docs
	$(VENV)/bin/python -m pytest tests/browser -rs

# the README's pictures, from the report of a run
pictures: $(DEV)
	$(VENV)/bin/python dev/pictures.py $(or $(RUN),runs/$(DEMO)-s$(SEED))

clean:
	rm -rf $(VENV) runs build

# torch is named with its exact version: a looser range can pull gigabytes of GPU packages onto a laptop
$(STAMP): pyproject.toml constraints.txt
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet -c constraints.txt torch==2.13.0 $(PIP_FLAGS) -e ".[train]"
	touch $(STAMP)

# tools, and the optional packages (peft, datasets, lm-eval, ...) that tests use
$(DEV): $(STAMP)
	$(VENV)/bin/python -m pip install --quiet -c constraints.txt torch==2.13.0 $(PIP_FLAGS) -e ".[dev]"
	touch $(DEV)

$(DOCS): $(STAMP)
	$(VENV)/bin/python -m pip install --quiet -c constraints.txt $(PIP_FLAGS) -e ".[docs]"
	touch $(DOCS)
