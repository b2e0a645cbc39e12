# Every target that runs Python makes its own virtual environment, .venv-<name>, and makes it again
# when pyproject.toml has changed. Needs a POSIX system, GNU make and Python 3.11 or newer.

PYTHON ?= python3
PYTEST_ARGS ?=
BENCH_ARGS ?=
FUZZ_ARGS ?=
# For 1,000 kills two processors take about a quarter of an hour; CHAOS_JOBS more at once need more.
CHAOS_JOBS ?= 2
CHAOS_SEED ?= 1
CHAOS_KILLS ?= 1000
CHAOS_OTHERS ?= 1
CHAOS_ROUNDS ?= 5
CHAOS_SECONDS ?= 40
CHAOS_FOLDER ?= chaos
# Debian's kernels for the tests between two kernels: that of the release, and that of its backports.
KERNELS ?= older,newer
# How many arrays go each way there.
ARRAYS ?= 200

SHELL := /bin/sh
.SHELLFLAGS := -ec
.DELETE_ON_ERROR:
.SUFFIXES:

ENVS := demo test test-oldest lint bench docs

# What pip installs into .venv-<name>.
INSTALL_demo := -e '.[demo]'
INSTALL_test := -e '.[test]'
INSTALL_test-oldest := -e '.[test]' dask==2026.7.1 distributed==2026.7.1
INSTALL_lint := -e '.[lint]'
INSTALL_bench := -e '.[bench]'
INSTALL_docs := -e '.[docs,test]'

# An environment whose Python doesn't start any more (the system's was upgraded) is made again.
$(foreach env,$(ENVS),$(if $(wildcard .venv-$(env)/stamp),\
  $(shell .venv-$(env)/bin/python -c '' >/dev/null 2>&1 || rm -f .venv-$(env)/stamp)))

.PHONY: help
help: ## list the targets (the default)
	@echo 'make TARGET [PYTHON=python3.12]'
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-16s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

.PHONY: demo
demo: .venv-demo/stamp ## a cluster, arrays that go through the pool, and what it saved
	@.venv-demo/bin/python -m dask_shm_bridge.demo

.PHONY: test
test: .venv-test/stamp ## the test suite (PYTEST_ARGS='-k ledger')
	@.venv-test/bin/python -m pytest $(PYTEST_ARGS)

.PHONY: test-oldest
test-oldest: .venv-test-oldest/stamp ## the same with the oldest Dask that is supported
	@.venv-test-oldest/bin/python -m pytest $(PYTEST_ARGS)

.PHONY: test-threshold
test-threshold: .venv-test/stamp ## the test suite, with every frame going through the pool
	@DASK_SHM_BRIDGE__THRESHOLD=1 .venv-test/bin/python -m pytest \
	  -m 'not threshold and not slow and not idle' $(PYTEST_ARGS)

.PHONY: test-browser
test-browser: .venv-test/stamp ## the dashboard page in a real browser (Debian: chromium, chromium-driver)
	@for program in chromium chromedriver; do command -v $$program >/dev/null || { \
	  echo "$$program is missing. On Debian: apt install chromium chromium-driver" >&2; exit 1; }; done
	@.venv-test/bin/python -m pytest -m browser $(PYTEST_ARGS)

.PHONY: test-windows
test-windows: .venv-test/stamp ## tests on a Windows Python under Wine, which root has installed
	@.venv-test/bin/python -m tests.windows test $(PYTEST_ARGS)

.PHONY: test-two-kernels
test-two-kernels: .venv-test/stamp ## tests between two kernels; installs QEMU (KERNELS=newer ARRAYS=20)
	@TWO_KERNELS=$(KERNELS) TWO_KERNELS_ARRAYS=$(ARRAYS) .venv-test/bin/python -m pytest tests/two_kernels $(PYTEST_ARGS)

.PHONY: chaos
chaos: .venv-test/stamp ## processes killed at every step, and a cluster under faults (CHAOS_KILLS=1000)
	@mkdir -p $(CHAOS_FOLDER)
	@PYTHONPATH=tests .venv-test/bin/python -m faults direct --kills $(CHAOS_KILLS) \
	  --others $(CHAOS_OTHERS) --jobs $(CHAOS_JOBS) --seed $(CHAOS_SEED) \
	  --json $(CHAOS_FOLDER)/direct.json
	@PYTHONPATH=tests .venv-test/bin/python -m faults cluster --rounds $(CHAOS_ROUNDS) \
	  --seconds $(CHAOS_SECONDS) --jobs `expr \( $(CHAOS_JOBS) + 1 \) / 2` \
	  --seed $(CHAOS_SEED) --tcp --json $(CHAOS_FOLDER)/cluster.json

.PHONY: lint
lint: .venv-lint/stamp ## ruff and mypy
	@.venv-lint/bin/python -m ruff check .
	@.venv-lint/bin/python -m ruff format --check .
	@.venv-lint/bin/python -m mypy
	@.venv-lint/bin/python -m mypy --platform win32 --follow-imports silent dask_shm_bridge/mapping/_windows*.py

.PHONY: bench
bench: .venv-bench/stamp ## the benchmarks (BENCH_ARGS='--help' lists them)
	@.venv-bench/bin/python -m dask_shm_bridge.benchmarks $(BENCH_ARGS)

.PHONY: docs
docs: .venv-docs/stamp ## the documentation, as HTML in build/docs; warnings are errors
	@.venv-docs/bin/python -m sphinx -q -W --keep-going -n -d build/doctrees docs build/docs
	@.venv-docs/bin/python -m pytest -q tests/test_docs.py -k 'not runs_as'
	@echo build/docs/index.html

.PHONY: fuzz
fuzz: .venv-test/stamp ## bad input for all that comes from outside (FUZZ_ARGS='--cases 200000')
	@.venv-test/bin/python -m tests.fuzz $(FUZZ_ARGS)

.PHONY: catalogue
catalogue: ## describe cuML anew; with the Python of a GPU machine that has cuML and this package's needs
	@PYTHONPATH=$(CURDIR) $(PYTHON) -m dask_shm_bridge.cuml.generate

.PHONY: clean
clean: ## remove the environments, caches and built files
	@rm -rf $(ENVS:%=.venv-%) build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamp comes last: an installation that failed or was interrupted starts from nothing.
.venv-%/stamp: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  found=`$(PYTHON) --version 2>&1` || found='not there'; \
	  echo "dask-shm-bridge needs Python 3.11 or newer, but $(PYTHON) is $$found." >&2; \
	  echo "Name another one: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; \
	  exit 1; }
	@echo "making $(@D) (once; takes a minute or two)" >&2
	@rm -rf $(@D)
	@$(PYTHON) -m venv $(@D)
	@$(@D)/bin/python -m pip install -qq --disable-pip-version-check $(INSTALL_$*)
	@touch $@
