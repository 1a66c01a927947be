# One verb per act; each sets up what it needs. Variables: PYTHON, VENV, TORCH (the PyTorch to install), JOBS (processes
# that test), MAX_JOBS.
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
JOBS ?= 2
RUNS ?= runs
BERT ?=
GPT ?=
BENCH ?=
NAME ?= intents
RECIPE ?=
BIN := $(VENV)/bin

.PHONY: demo recipe test test-heavy sanitize bench lint format dev info clean
.DEFAULT_GOAL := help

help:
	@echo "make demo        pretrain a BERT and a GPT on six novels (about 5 minutes on 2 cores); results in $(RUNS)/"
	@echo "make recipe NAME=intents   fine-tune on real data: intents, topics, tweets, reviews, entities,"
	@echo "                           descriptions, corrections, translations, continuations, replies"
	@echo "make test        all tests        make test-heavy  also the large matrices"
	@echo "make sanitize    the CPU kernels under AddressSanitizer and UndefinedBehaviorSanitizer, on every instruction set"
	@echo "make bench       every operator beside PyTorch"
	@echo "make lint format dev info clean"

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip

$(VENV)/.installed: $(BIN)/python pyproject.toml setup.py CMakeLists.txt $(shell find csrc -type f)
	$(BIN)/pip install --quiet "$(TORCH)"
	$(BIN)/pip install --quiet -e .
	@touch $@

$(VENV)/.tested: $(VENV)/.installed
	$(BIN)/pip install --quiet -e ".[test]"
	@touch $@

$(VENV)/.dev: $(VENV)/.tested
	$(BIN)/pip install --quiet "setuptools>=77" "pybind11>=3.0" "cmake>=3.25" ninja ruff mypy clang-format
	$(BIN)/pip install --quiet --no-build-isolation -e .
	@touch $@

# a run that is there already goes on, or tells again what came out
begun = $(if $(wildcard $(RUNS)/$(1)/config.yaml),--resume $(RUNS)/$(1),examples/train_$(1).yaml --output $(RUNS)/$(1))

demo: $(VENV)/.installed
	$(BIN)/llmengine train $(call begun,bert) $(BERT)
	$(BIN)/llmengine train $(call begun,gpt) $(GPT)

recipe: $(VENV)/.installed
	$(BIN)/python examples/recipes/run.py $(NAME) --folder $(RUNS)/recipes $(RECIPE)

test: $(VENV)/.tested
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest tests -m "not heavy" -n $(JOBS) --dist loadfile

test-heavy: $(VENV)/.tested
	$(BIN)/python -m pytest tests

# ThreadSanitizer is left out: GCC's OpenMP runtime tells it of no barrier, so that every region would be a race.
sanitize: $(VENV)/.dev
	LLMENGINE_TEST_SANITIZE=address,undefined $(BIN)/python -m pytest tests/test_products.py tests/test_vec_math.py
	$(BIN)/python -m pytest tests/test_native_builds.py -m heavy -k sanitizers

bench: $(VENV)/.tested
	$(BIN)/python -m pytest benchmarks/ --benchmark-only $(BENCH)

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $$(find csrc tests -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')
	$(BIN)/mypy

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $$(find csrc tests -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')

dev: $(VENV)/.dev

info: $(VENV)/.installed
	$(BIN)/llmengine info

clean:
	rm -rf build dist *.egg-info llmengine/_cpu*.so llmengine/_cuda*.so
