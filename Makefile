# Everything runs in ./.venv, which launch/setup.sh makes on first use. Needs Python 3.11 to 3.13; choose one with PYTHON=/path/to/python
PYTHON ?=
TANDEM = .venv/bin/tandem
PYTEST = .venv/bin/python -m pytest

.PHONY: setup demo test test-slow doctor clean

demo: setup             ## train a small model on two CPU cores, live
	$(TANDEM) train configs/demo.yaml run.name=demo-$$(date +%Y%m%d-%H%M%S)

setup:                  ## install the tested versions into ./.venv
	@PYTHON="$(PYTHON)" bash launch/setup.sh

test: setup             ## all tests but slow, nightly and gpu ones
	$(PYTEST) -q

test-slow: setup        ## the slow ones
	$(PYTEST) -q -m "slow and not gpu"

doctor: setup           ## what is installed, what this machine has, whether a run could start
	$(TANDEM) doctor

clean:                  ## remove the environment and generated models; runs/ stays
	rm -rf .venv models build tandem_rl.egg-info
