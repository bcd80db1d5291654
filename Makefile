# Every target sets up what it needs: a fresh clone with Python >= 3.11 and a package index is enough.
#   make quickstart   environment, then the whole product on input.txt with a small model on a CPU
#   make test         environment, then all tests (no network, no GPU)
#   make setup        environment alone, with what the tests need
#   make lint         ruff's rules and form over everything, mypy over the product
#   make fuzz         the tests that mutate files, with many more cases: FUZZ_CASES=10000
#   make bench        the benchmarks behind the figures in README
#   make resolve      do the requirements resolve, and the sources compile, under every Python promised?
# Another interpreter:  make test PYTHON=python3.12

PYTHON ?= python3
VENV ?= .venv
ifeq ($(OS),Windows_NT)
BIN := $(VENV)/Scripts
else
BIN := $(VENV)/bin
endif
PY := $(BIN)/python

# Many processes import the same modules: what one has compiled is kept, whatever the environment says.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: quickstart setup test lint fuzz bench resolve clean
.DEFAULT_GOAL := quickstart

# pip runs only when a requirements file is newer than the stamp that the last installation left. It
# compiles nothing: most of these files are never imported, and the others are compiled when they are.
$(VENV)/.stages: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.12 ...")'
	@test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check --no-compile -r requirements.txt
	@touch $@

$(VENV)/.dev: requirements-dev.txt requirements-adapters.txt requirements-ray.txt $(VENV)/.stages
	$(PY) -m pip install --quiet --disable-pip-version-check --no-compile -r requirements-dev.txt
	@touch $@

# Each step keeps what an earlier run of it left, and says so.
QUICK := checkpoints/quickstart

define NEXT_STEPS

What there is now
  $(QUICK)/report.html       curves, samples, settings, findings: open it in a browser
  $(QUICK)/metrics.jsonl     the same in numbers, a line for every event
  $(QUICK)/final_model.pt    the last model, which has seen the text 6 times; the samples are its own
  $(QUICK)/best_val_loss.pt  the one with the lowest validation loss; the score is of this one
  $(QUICK)/data              the tokens
The validation loss first falls below the unigram entropy (both are in the lines of step 2): more than
frequencies were learnt. Then it rises, as a text this short is soon known by heart: more text is the cure.

Talk to it      $(PY) sample.py --checkpoint $(QUICK)/final_model.pt
Your own text   $(PY) train_gpt2.py --config configs/quickstart.yaml --data FILE --out_dir checkpoints/mine

The real thing: GPT-2 124M on 10 billion tokens of FineWeb-Edu, on 8 GPUs
  $(PY) fineweb.py
  $(BIN)/torchrun --nproc_per_node=8 train_gpt2.py --config configs/gpt2-124m.yaml
  $(BIN)/torchrun --nproc_per_node=8 hellaswag.py --checkpoint checkpoints/gpt2-124m/best_val_loss.pt
endef
export NEXT_STEPS

quickstart: $(VENV)/.stages
	@echo "Text becomes tokens, a small GPT learns them on the CPU, is scored, writes, and a page shows how it went:"
	@echo "three to four minutes on two older cores; once it learns, step 2 says how long that takes here."
	@echo "== 1. Text becomes tokens"
	$(PY) fineweb.py --source input.txt --val_fraction 0.1 --out_dir $(QUICK)/data
	$(PY) fineweb.py --verify --out_dir $(QUICK)/data
	@echo "== 2. A small GPT learns them"
	$(PY) train_gpt2.py --config configs/quickstart.yaml
	@echo "== 3. It is scored on items in the format of HellaSwag; chance is 0.25, and it knows little"
	$(PY) hellaswag.py --checkpoint $(QUICK)/best_val_loss.pt --data tests/data/hellaswag_items.jsonl
	@echo "== 4. It writes"
	$(PY) sample.py --checkpoint $(QUICK)/final_model.pt --prompt "The boat" --num_samples 2 \
		--max_new_tokens 60 --temperature 0.5 --seed 1
	@echo "== 5. What happened, as a page"
	$(PY) -m pretrain.report $(QUICK)
	@echo "$$NEXT_STEPS"

setup: $(VENV)/.dev

# Tests are small: one thread each and several at a time beats the other way round. Each process takes
# a stretch of them, so that few fixtures are made twice; one that is done early helps another.
test: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(PY) -m pytest --numprocesses auto --maxprocesses 8 --dist worksteal $(PYTEST_ARGS)

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Hours of cases are no hang: the limit on a test's time is off.
FUZZ_CASES ?= 10000
fuzz: $(VENV)/.dev
	FUZZ_CASES=$(FUZZ_CASES) OMP_NUM_THREADS=1 $(PY) -m pytest -m hypothesis --timeout=0 \
		--numprocesses auto --maxprocesses 8 --dist worksteal $(PYTEST_ARGS)

# lm_eval's versions of other packages leave those of this project alone.
HARNESS := $(VENV)/lm_eval
$(HARNESS)/.installed:
	$(PYTHON) -m venv $(HARNESS)
	$(HARNESS)/$(notdir $(BIN))/python -m pip install --quiet --disable-pip-version-check 'lm_eval[hf]'
	@touch $@

# What some have to be told.
ARGS_recipe.py := --data input.txt --small --steps 96
ARGS_gpu.py := --out_dir checkpoints/gpu-benchmark
ARGS_hellaswag_lm_eval.py := --harness $(HARNESS)/$(notdir $(BIN))/python
bench: $(VENV)/.dev $(HARNESS)/.installed
	$(foreach script,$(sort $(wildcard benchmarks/*.py)),\
		@echo "== $(script)"$(newline)	$(PY) $(script) $(ARGS_$(notdir $(script)))$(newline))

# A line of a recipe ends where one of these does.
define newline


endef

resolve:
	$(PYTHON) .ci/resolve

clean:
	rm -rf checkpoints/quickstart
