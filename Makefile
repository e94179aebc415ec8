# Everything runs in ./.venv, which launch/setup.sh makes on first use.
# It needs Python 3.11 to 3.13; choose one with PYTHON=/path/to/python
PYTHON ?=
TANDEM = .venv/bin/tandem
PYTEST = .venv/bin/python -m pytest

.DEFAULT_GOAL = help
.PHONY: help demo setup lint format types fast test test-slow doctor clean

help:                   ## this list
	@sed -n 's/^\([a-z-]*\):.*## /\1@/p' Makefile | column -t -s @

demo: setup             ## train a small model on two CPU cores, live
	$(TANDEM) train configs/demo.yaml run.name=demo-$$(date +%Y%m%d-%H%M%S)

setup:                  ## install the tested versions into ./.venv
	@PYTHON="$(PYTHON)" bash launch/setup.sh

lint: setup             ## format, lint, imports between rooms, types
	@bash .ci/lint check

format: setup           ## format all Python files, and mend what ruff can mend
	@bash .ci/lint format

types: setup            ## commit to fewer type errors: writes .ci/types.json
	@bash .ci/lint types

fast: setup             ## the tests to run while you work, under a minute
	$(PYTEST) -q -m fast tests/unit

test: setup             ## all tests but slow, nightly and gpu ones
	$(PYTEST) -q

test-slow: setup        ## the slow ones
	$(PYTEST) -q -m "slow and not gpu"

doctor: setup           ## what is installed, what this machine has, whether a run could start
	$(TANDEM) doctor

clean:                  ## remove the environments and generated models; runs/ stays
	rm -rf .venv .venv-lint models build tandem_rl.egg-info
