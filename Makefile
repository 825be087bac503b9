PYTHON ?= python3
# One thread for each of the processes that share the test files.
PYTEST = OMP_NUM_THREADS=1 "$(PY)" -m pytest tests -q --durations=15 -n auto --maxprocesses=4 --dist=loadfile
PY = $(shell $(PYTHON) tools/setup_env.py --print-python)

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-fast lint clean-demo

help:  ## Show these targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 20

setup:  ## Install what is missing, into the active environment if it has torch, else into .venv
	@$(PYTHON) tools/setup_env.py

demo: setup  ## Train and test a classifier, a detector and a segmenter on the embedded data set
	@"$(PY)" tools/demo.py

test: setup  ## Run the whole test suite
	@$(PYTEST)

test-fast: setup  ## Run the tests that take seconds
	@$(PYTEST) -m "not slow"

lint: setup  ## Check style, types and formatting
	@PATH="$$(dirname "$(PY)"):$$PATH" "$(PY)" -m pre_commit run --all-files

clean-demo:  ## Remove the demo's data and results, to start it over
	rm -rf work_dirs/demo data/photo_digits
