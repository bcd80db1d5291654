# Every target sets up what it needs: a fresh clone with Python >= 3.10 and a package index is enough.
#   make quickstart   environment, then the whole product on input.txt with a small model on a CPU
#   make test         environment, then all tests (no network, no GPU)
#   make lint         ruff
#   make bench        the benchmarks behind the figures in README
# Another interpreter:  make test PYTHON=python3.12

PYTHON ?= python3
VENV ?= .venv
ifeq ($(OS),Windows_NT)
BIN := $(VENV)/Scripts
else
BIN := $(VENV)/bin
endif
PY := $(BIN)/python

.PHONY: quickstart test lint bench clean
.DEFAULT_GOAL := quickstart

# pip runs only when a requirements file is newer than the stamp that the last installation left.
$(VENV)/.stages: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed: make PYTHON=python3.12 ...")'
	@test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

$(VENV)/.dev: requirements-dev.txt requirements-adapters.txt $(VENV)/.stages
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	@touch $@

quickstart: $(VENV)/.stages
	$(PY) fineweb.py --source input.txt --out_dir data/quickstart
	$(PY) fineweb.py --source input.txt --out_dir data/quickstart --verify

# Tests are small: one thread each and several at a time beats the other way round.
test: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(PY) -m pytest --numprocesses auto --maxprocesses 8 $(PYTEST_ARGS)

lint: $(VENV)/.dev
	$(BIN)/ruff check .

bench: $(VENV)/.dev
	$(PY) benchmarks/data_prep.py
	$(PY) benchmarks/loader.py
	$(PY) benchmarks/train_step.py
	$(PY) benchmarks/generate.py
	$(PY) benchmarks/hellaswag_eval.py

clean:
	rm -rf data/quickstart
