# make demo and make test need nothing but Python 3.11 or newer: they set up .venv by themselves, once.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TORCH := 2.13.0
# pytest arguments, for example: make test ARGS="tests/unit -k rope"
ARGS ?=
# Arguments of the demo, for example: make demo DEMO="--steps 20"
DEMO ?=

.PHONY: demo test lint types spelling docs coverage check bench validate-plan pictures clean

demo: $(VENV)/ready
	$(BIN)/internevo demo $(DEMO)

test: $(VENV)/ready
	$(BIN)/python -m pytest -n 2 --dist worksteal $(ARGS)

lint: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/ready
	$(BIN)/mypy

spelling: $(VENV)/ready
	$(BIN)/codespell

docs: $(VENV)/ready
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

# The tests, measured in all processes that they start. Python 3.12 and newer measure without slowing the tests down.
coverage: export PYTHONPATH := $(CURDIR)
coverage: export COVERAGE_CORE = $(shell $(BIN)/python -c 'import sys; print("sysmon" if sys.version_info >= (3, 12) else "ctrace")')
coverage: $(VENV)/ready
	rm -rf build/coverage
	$(BIN)/coverage run -m pytest -n 2 --dist worksteal $(ARGS)
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage report

# What CI runs.
check: lint types spelling docs test

# Speed next to PyTorch and transformers on this machine, compared with benchmarks/ratios.json. It is no part of the check.
bench: $(VENV)/ready
	$(BIN)/python benchmarks/bench.py $(ARGS)

# The planner next to measurements that others published (the table is not a part of this repository), as tables and pictures.
MEASUREMENTS ?= measurements.csv
validate-plan: $(VENV)/ready
	$(BIN)/python benchmarks/plan.py --measurements $(MEASUREMENTS) --pictures docs/images $(ARGS)

# The pictures of the console and of reports in docs/images. It needs the demo's data (make demo) and Chromium.
pictures: $(VENV)/ready
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[pictures]'
	rm -rf build/pictures
	$(BIN)/python benchmarks/pictures.py $(ARGS)

clean:
	rm -rf $(VENV) demo site build

# Made again when the pinned versions or the package's dependencies change. Without a GPU, the CPU build of PyTorch is taken when the
# index has one (TORCH_INDEX names another index).
$(VENV)/ready: constraints.txt pyproject.toml
	@command -v $(PYTHON) >/dev/null || { echo "error: $(PYTHON) is not installed; install Python 3.11 or newer, or give PYTHON=..." >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: $(PYTHON) is older than 3.11; give PYTHON=python3.12, say" >&2; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { echo "error: this Python has no venv module; on Debian: apt install python3-venv" >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV) (a few minutes the first time)"
	@command -v nvidia-smi >/dev/null || $(BIN)/python -m pip install -q $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch==$(TORCH)+cpu 2>/dev/null || true
	$(BIN)/python -m pip install -q torch==$(TORCH)
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev]'
	@touch $@
