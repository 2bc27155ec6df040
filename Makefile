# setup: .venv from the lock file     demo: train a small model to reason, on any machine
# check: format, lint, types, layers  test: every test, the real stack included
.PHONY: setup demo check test
PYTHON ?= python3
SEED ?= 0
BIN := .venv/bin
STAMP := .venv/.setup-$(shell cat requirements-cpu.lock pyproject.toml Makefile | cksum | cut -d' ' -f1)
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet install

setup: $(STAMP)

$(STAMP):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' || \
	  { echo "setup: slime's CPU lock file is for Python 3.11, and $(PYTHON) is $$($(PYTHON) --version 2>&1). Try: make setup PYTHON=python3.11"; exit 1; }
	@echo "setup: .venv (3.6 GB, a few minutes; only the first time)"
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv || \
	  { rm -rf .venv; echo "setup: '$(PYTHON) -m venv' failed. Install Python's venv module, then repeat."; exit 1; }
	@echo "setup: 1/3 torch"
	@$(PIP) torch==2.13.0 || { echo "setup: installing torch 2.13.0 failed (see above). Check the network and pip's configuration, then repeat."; exit 1; }
	@echo "setup: 2/3 the locked packages"
	@$(PIP) --no-deps -r requirements-cpu.lock || { echo "setup: installing requirements-cpu.lock failed (see above). Check the network and the disk, then repeat."; exit 1; }
	@echo "setup: 3/3 slime"
	@$(PIP) --no-deps --no-build-isolation -e . || { echo "setup: installing slime itself failed (see above)."; exit 1; }
	@rm -f .venv/.setup-* && touch $@
	@echo "setup: done. 'make demo' trains; '. .venv/bin/activate' puts slime on the path"

demo: setup
	@PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python examples/reasoning/demo.py --seed $(SEED) --run-dir runs/demo

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

test: setup
	OMP_NUM_THREADS=1 $(BIN)/pytest
