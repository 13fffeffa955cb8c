# Everything on a fresh machine with Python (3.11 or later), git and make: `make demo`, `make test`, `make lint`.
# Each makes .venv from requirements-dev.txt first, when it is missing or older than that file.
# On a machine that has its own torch: `make test-gpu PY=python3` runs with that Python and installs nothing.
# JOBS=N sets the number of test processes: 2 for `make test`, 14 for `make test-gpu`, where each has a CUDA context of its own.

PYTHON ?= python3

ifeq ($(origin PY),undefined)
PY := .venv/bin/python
READY := .venv/.installed
endif

# Set for every recipe: the packages are found also where nothing was installed, and no model is looked for on a network.
export PYTHONPATH := $(CURDIR):$(CURDIR)/kernels
export HF_HUB_OFFLINE := 1

.PHONY: help demo test lint fuzz zoo test-gpu clean

help:
	@echo "make demo      real models, eager beside fused (examples/quickstart.py)"
	@echo "make test      every test that needs no GPU"
	@echo "make lint      ruff and pyright"
	@echo "make fuzz      the long fuzz, 3,000 programs; goes on where it was stopped (out/fuzz.json)"
	@echo "make zoo       every architecture of transformers, into docs/zoo.md; goes on where it was stopped (out/zoo.json)"
	@echo "make test-gpu  the tests that need a CUDA device"
	@echo "make clean     remove .venv and everything that was built"

demo: $(READY)
	$(PY) examples/quickstart.py

test: JOBS ?= 2
test: $(READY)
	OMP_NUM_THREADS=1 $(PY) -m pytest -n $(JOBS) -m "not gpu" tests

lint: $(READY)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m pyright

fuzz: $(READY)
	$(PY) -m tests.fuzz.long --examples 3000 --seed 0 --resume out/fuzz.json

# About an hour and a half on one core; ARGS="--only bert" measures one architecture again.
zoo: $(READY)
	$(PY) -W ignore -m tests.zoo.run --resume out/zoo.json $(ARGS)
	$(PY) -m tests.zoo.table out/zoo.json docs/zoo.md

# Nearly all of the time is Triton's compiler, on the host: hence the processes. No test here measures time.
# With several devices the processes take them in turn.
test-gpu: JOBS ?= 14
test-gpu: $(READY)
	OMP_NUM_THREADS=1 FUSION_PASS_TEST_DEVICE=cuda FUSION_PASS_TEST_GPUS=$$(nvidia-smi -L | wc -l) \
	$(PY) -m pytest -n $(JOBS) --dist worksteal -m gpu tests

# torch comes first and alone: with the build that pip is configured to find, and with nothing else pulling another in.
.venv/.installed: requirements-dev.txt pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or later is needed, this is " + sys.version if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet "$$(sed -n 's/^\(torch==[^ ]*\).*/\1/p' requirements-dev.txt)"
	.venv/bin/python -m pip install --quiet -r requirements-dev.txt
	.venv/bin/python -m pip install --quiet --no-build-isolation --no-deps -e .
	touch $@

clean:
	rm -rf .venv dist build out .pytest_cache .ruff_cache .hypothesis
