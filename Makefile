# Everything a newcomer types. `make quickstart` first, `make test` second; `make help` lists the rest.
SHELL := /bin/bash
.DELETE_ON_ERROR:
.PHONY: help quickstart install test test-oldest test-slow test-faults test-slurm test-gpu bench-gpu lint clean

VENV := .venv
PY := $(VENV)/bin/python
OLDEST := .venv-oldest
OUTPUT ?= runs/tiny
# Two data-parallel processes use two cores better than two threads do: the tiny model's matrices are too small to share.
NPROC ?= $(shell [ "$$(getconf _NPROCESSORS_ONLN)" -ge 2 ] && echo 2 || echo 1)
PYTEST := $(PY) -m pytest
# `make test-gpu PY=python3` takes that Python as it is: nothing is installed, and the sources are found by path.
READY := $(if $(filter command,$(firstword $(origin PY))),,install)
SOURCES := $(CURDIR):$(CURDIR)/kernels:$(CURDIR)/launcher
export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM := false
export HF_HUB_OFFLINE ?= 1

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

quickstart: install ## run all of PostNAS on this machine's CPU, from the bundled teacher, into runs/tiny
	env -u OMP_NUM_THREADS $(PY) launcher/postnas.py run tiny nproc=$(NPROC) --output "$(OUTPUT)"

install: $(VENV)/.installed ## make .venv and install the project into it (seconds when nothing changed)

$(VENV)/.installed: pyproject.toml constraints.txt tools/find_python.sh
	@python="$$(bash tools/find_python.sh)" || exit 1; \
	echo "setting up $(VENV) with $$python"; \
	$(PY) -m pip --version >/dev/null 2>&1 || "$$python" -m venv $(VENV) || exit 1; \
	$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[train,launch,eval,dev]'
	@touch $@

test: $(READY) ## run the tests (2 cores: see README for the time it takes)
	$(PYTEST) -m "not slow and not faults and not gpu and not multi_gpu and not slurm"

test-oldest: $(OLDEST)/.installed ## conversion, generation and a short run with the oldest versions that pyproject.toml promises
	PATH="$(CURDIR)/$(OLDEST)/bin:$$PATH" bash tests/oldest.sh

$(OLDEST)/.installed: pyproject.toml constraints.txt tools/oldest_versions.py tools/find_python.sh
	@python="$$(bash tools/find_python.sh)" || exit 1; \
	"$$python" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 12))' || \
	  { echo "error: the oldest versions have no wheels for $$python; make PYTHON=/path/to/python3.12 $@" >&2; exit 1; }; \
	echo "setting up $(OLDEST) with $$python"; \
	"$$python" -m venv $(OLDEST) || exit 1; \
	"$$python" tools/oldest_versions.py > $(OLDEST)/versions.txt || exit 1; \
	$(OLDEST)/bin/python -m pip install --quiet --disable-pip-version-check -c $(OLDEST)/versions.txt -e '.[train]' \
	  pytest pytest-timeout pytest-xdist hypothesis
	@touch $@

test-slow: $(READY) ## the tests that take minutes each
	$(PYTEST) -m slow --timeout 3600

test-faults: $(READY) ## runs killed at random moments end like runs left alone (minutes)
	$(PYTEST) -m faults tests/faults --timeout 3600

test-slurm: install ## jobs on a real Slurm, which it installs (Debian packages) and starts here; needs root (6 minutes, 2 cores)
	bash tests/slurm/run.sh

# One process, so whatever network there is does not matter: some GPU machines have none.
test-gpu: $(READY) ## the tests that need a GPU: one process, at most 8 minutes; PY=python3 installs nothing
	PYTHONPATH="$(SOURCES)$${PYTHONPATH:+:$$PYTHONPATH}" NCCL_SOCKET_IFNAME=lo GLOO_SOCKET_IFNAME=lo \
	    $(PYTEST) -m gpu tests

bench-gpu: $(READY) ## speed on a GPU in minutes, into docs/benchmarks/ (FULL=1: every context and peer, in hours)
	PYTHONPATH="$(SOURCES)$${PYTHONPATH:+:$$PYTHONPATH}" PY=$(PY) bash tools/bench_gpu.sh $(if $(FULL),--full)

lint: install ## ruff, as pre-commit runs it
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

clean: ## remove caches; runs/ and environments stay
	rm -rf .pytest_cache .ruff_cache .hypothesis build dist *.egg-info
	find . -name __pycache__ -not -path './.venv*/*' -prune -exec rm -rf {} +
