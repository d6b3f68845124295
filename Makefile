# venv and pip inside; every target can be run on a fresh machine with Python 3.11 or newer.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
SPATIAL_FORCING := $(BIN)/spatial-forcing

.PHONY: help setup gl libero quickstart quickstart-smoke test test-plugin test-slow lint types format clean

help:  ## Show the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  %-18s %s\n", $$1, $$2}'

setup: $(VENV)/.stamp  ## Create .venv and install the package with all that the tests need

$(VENV)/.stamp: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed; set PYTHON=python3.11") if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
# The client that robots use with openpi; it pins numpy < 2, which it does not need.
	-$(BIN)/python -m pip install --quiet --no-deps openpi-client==0.1.2 dm-tree typing_extensions
	@touch $@

gl:  ## Install the software OpenGL library that the simulators render with, if it is missing
	@$(PYTHON) scripts/install_gl.py

libero: $(VENV)/.libero  ## Install LIBERO's simulator (0.9 GB)

$(VENV)/.libero: $(VENV)/.stamp
# Without its pins: a CUDA torch, an old numpy and an old transformers, none of which it needs here.
	@$(BIN)/python -m pip install --quiet --editable '.[dev,libero]' \
	  && $(BIN)/python -m pip install --quiet --no-deps hf-libero==0.1.4 robosuite==1.4.0 bddl==1.0.1 \
	  && touch $@ || echo "make: LIBERO's simulator could not be installed; tests that need it will be skipped"

quickstart: setup gl libero  ## The main job, end to end: ten minutes on two cores
	$(SPATIAL_FORCING) quickstart $(ARGS)

quickstart-smoke: setup gl libero  ## The same stages at toy size: under four minutes
	$(SPATIAL_FORCING) quickstart --smoke $(ARGS)

lint: setup  ## ruff: style and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup  ## mypy
	$(BIN)/mypy

test: setup gl libero lint types  ## Everything that CI runs, but the smoke variant of the quickstart
	$(BIN)/python -m pytest $(ARGS)

test-plugin:  ## Tests of the LeRobot plugin in .venv-plugin, where Python 3.12 is found
	scripts/plugin_tests.sh $(ARGS)

test-slow: setup gl libero  ## Tests of over a minute; run before a release
	$(BIN)/python -m pytest -m slow $(ARGS)

format: setup  ## Rewrite the code as ruff wants it
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## Remove the virtual environment and caches
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis
