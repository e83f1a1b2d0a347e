# `make demo` trains a model in minutes; `make programs` and `make dialogue` train other tasks. `make test` runs the quick tests, `make test-all`
# all of them, `make faults` breaks runs on purpose, and `make docs` builds the documentation as a site. Each sets up what it needs.
PYTHON ?= python3
VENV ?= .venv
SOURCES := pyproject.toml constraints.txt
PIP := $(VENV)/bin/python -m pip install --quiet --constraint constraints.txt

REWARD_MODEL := runs/dialogue_reward_model

.PHONY: demo programs dialogue test test-slow test-all faults lint docs clean

demo: $(VENV)/.installed
	$(VENV)/bin/coterie train recipes/equations.yaml

programs: $(VENV)/.installed
	$(VENV)/bin/coterie train recipes/programs.yaml

dialogue: $(VENV)/.installed $(REWARD_MODEL)/summary.json
	$(VENV)/bin/coterie train recipes/dialogue.yaml

# Made once; what was interrupted goes on where it stopped
$(REWARD_MODEL)/summary.json: | $(VENV)/.installed
	if [ -d $(REWARD_MODEL) ]; then $(VENV)/bin/coterie train --resume $(REWARD_MODEL); \
	else $(VENV)/bin/coterie train recipes/dialogue_reward_model.yaml; fi

# Two processes with one thread each: twice as fast on two cores, and the same everywhere
PYTEST = OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n 2

test: $(VENV)/.installed-dev
	$(PYTEST) -m "not slow"

test-slow: $(VENV)/.installed-dev
	$(PYTEST) -m slow

test-all: test test-slow

faults: $(VENV)/.installed-dev
	$(VENV)/bin/python benchmarks/faults.py
	$(VENV)/bin/python benchmarks/saving.py

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

$(VENV)/.installed-dev: $(SOURCES) | $(VENV)/bin/python
	$(PIP) --editable '.[dev]'
	touch $(VENV)/.installed $@

clean:
	rm -rf $(VENV) dist build site
