# Every command builds .venv first when it is missing or older than what it is made from.
PYTHON  ?= python3
PROFILE ?= digits
BIN     := .venv/bin
STAMP   := .venv/.installed

.DEFAULT_GOAL := help
.PHONY: help install reproduce test lab bench

help:
	@echo "make reproduce   run the profile digits, 00 to 08, and say where the report is (PROFILE=cifar10-cpu for another)"
	@echo "make test        check style, types and everything that can be tested"
	@echo "make lab         open JupyterLab on notebook 00, beside the others"
	@echo "make bench       measure speed against peers and against the floor"
	@echo "make install     only build .venv (PYTHON=python3.12 for another Python)"

install: $(STAMP)

# Without the stamp an environment is half-made, and is made again; with an old one it is brought up to date.
$(STAMP): requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info; v >= (3, 11) or sys.exit("found Python %d.%d, expected 3.11 or newer; \
	name another one: make PYTHON=python3.12 ..." % v[:2])'
	@test -e $(STAMP) || rm -rf .venv
	@test -e $(STAMP) || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check -r requirements.txt
	$(BIN)/python -m pip install --disable-pip-version-check --no-deps -e .
	@touch $(STAMP)

reproduce: $(STAMP)
	$(BIN)/python -m cadetlib.reproduce $(PROFILE)

# One thread a worker: two workers with two threads each would wait for one another on two cores. A file is one worker's, and so
# is a notebook. The notebooks read what the test of the profile digits, which is among the first, has left.
test: $(STAMP)
	$(BIN)/ruff check cadetlib tests benchmarks notebooks
	$(BIN)/ruff format --check cadetlib tests benchmarks
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --doctest-modules --nbval-lax \
		cadetlib tests notebooks

lab: $(STAMP)
	$(BIN)/jupyter lab notebooks/00_setup.ipynb

bench: $(STAMP)
	$(BIN)/python benchmarks/run.py
