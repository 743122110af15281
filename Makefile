# `make demo` and `make test` do all their set-up by themselves; they need python3 >= 3.10 with pip
# and venv. `make test VENV=` installs nothing and uses what PYTHON has.

PYTHON ?= python3
VENV ?= .venv
ARGS ?=
# Test processes. On a GPU they share its memory, so fewer than there are cores.
WORKERS ?= $$($(PY) -c "import torch; print(4 if torch.cuda.is_available() else 'auto')")

ifeq ($(strip $(VENV)),)
PY = PYTHONPATH="$(CURDIR)/src$${PYTHONPATH:+:$$PYTHONPATH}" $(PYTHON)
SETUP =
else
PY = $(VENV)/bin/python
SETUP = $(VENV)/.triflash-is-installed
endif

.PHONY: help demo test smoke bench bench-runtime bench-memory lint types format setup clean distclean

help:
	@echo "make demo      train a tiny GPT through triflash and through PyTorch, and compare"
	@echo "make test      run the tests (ARGS='-k causal' to choose, WORKERS=1 for one process)"
	@echo "make smoke     run those of everything around the kernels, in about a minute"
	@echo "make bench     measure all presets into out/bench, and make the report there"
	@echo "make bench-runtime, make bench-memory   one table each (ARGS=--markdown)"
	@echo "make lint      ruff check and ruff format --check"
	@echo "make types     mypy"
	@echo "make format    let ruff rewrite the files"
	@echo "make setup     only install, into VENV ($(VENV))"
	@echo "make clean     remove caches and out/; make distclean removes .venv too"

demo: $(SETUP)
	$(PY) -m triflash train $(ARGS)

test: $(SETUP)
	$(PY) -m pytest -n $(WORKERS) --dist worksteal $(ARGS)

# What a change around the kernels breaks elsewhere, told before all tests have run.
SMOKE = api architecture block_mask cli docs masks misuse nn padding reference torch
smoke: $(SETUP)
	$(PY) -m pytest -n $(WORKERS) --dist worksteal $(SMOKE:%=tests/test_%.py) $(ARGS)

# What is measured already is not measured again, so this can be interrupted; `make clean` forgets.
bench: $(SETUP)
	$(PY) -m triflash bench all --output out/bench/results.json $(ARGS)
	$(PY) -m triflash bench report out/bench/results.json --output-dir out/bench

bench-runtime: $(SETUP)
	$(PY) -m triflash bench runtime $(ARGS)

bench-memory: $(SETUP)
	$(PY) -m triflash bench memory $(ARGS)

lint: $(SETUP)
	$(PY) -m ruff check
	$(PY) -m ruff format --check

format: $(SETUP)
	$(PY) -m ruff check --fix
	$(PY) -m ruff format

types: $(SETUP)
	$(PY) -m mypy

setup: $(SETUP)

ifneq ($(SETUP),)
# pip 25.1 is the first that knows dependency groups.
$(SETUP): pyproject.toml constraints.txt
	@$(PYTHON) -c "import sys; v = sys.version_info; v >= (3, 10) or sys.exit('triflash needs Python 3.10 or later, this is %d.%d; give another: make PYTHON=python3.12' % v[:2])"
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --upgrade "pip>=25.1"
	$(VENV)/bin/python -m pip install -c constraints.txt -e . --group dev
	@touch $@
endif

clean:
	rm -rf out dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean
	rm -rf .venv
