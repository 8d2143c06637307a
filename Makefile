.DEFAULT_GOAL := help
.PHONY: help setup build demo test engines lint format bench multi-gpu docs clean

PYTHON ?= python3
BIN := .venv/bin
GPU := $(shell nvidia-smi -L 2>/dev/null)
# Without a GPU: the release that the C++ is developed against. With one: the newest that the package index and the
# driver of the machine offer.
TORCH := $(if $(GPU),torch>=2.10,torch==2.13.0)
# The CUDA binary is built where a GPU can run it, where ABIDING_CUDA=on|auto asks for it, and after a "make build".
CUDA := $(or $(ABIDING_CUDA),$(patsubst build/installed-%,%,$(wildcard build/installed-*)),$(if $(GPU),auto,off))
SOURCES := pyproject.toml CMakeLists.txt $(shell find cmake csrc -type f)
CXX_SOURCES := $(filter %.cpp %.h %.cu %.cuh,$(SOURCES))

help: ## show this list
	@sed -nE 's/^([a-z-]+):.*## (.*)/  make \1\t\2/p' Makefile | expand -t 20

setup: build/installed-$(CUDA) ## make .venv: torch, every tool, this package

build: build/installed-$(or $(ABIDING_CUDA),auto) ## compile both binaries (the CUDA one where nvcc is found)

demo: setup ## run the main job and check it against the reference, on a GPU if there is one
	$(BIN)/abiding demo

test: setup ## run the tests
	$(BIN)/python -m pytest -n 2 --dist worksteal

engines: setup ## check our code against vLLM's and transformers' own Python, oldest and newest release
	@timeout 600 $(BIN)/python tools/fetch_engines.py build/engines; status=$$?; \
	if [ $$status = 3 ]; then echo "skipped: the engines' packages are not to be had here"; exit 0; fi; \
	if [ $$status != 0 ]; then exit $$status; fi; \
	ABIDING_REQUIRE_ENGINES=1 timeout 600 $(BIN)/python -m pytest --quiet -n 2 tests/engines/test_vllm.py || exit; \
	for release in build/engines/transformers-*; do \
		PYTHONPATH=$$release:build/engines/site timeout 600 $(BIN)/python -m pytest --quiet tests/engines/test_transformers* \
			|| exit; \
	done

lint: setup ## check style, types and the length of lines
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CXX_SOURCES)
	$(BIN)/python tools/check_lines.py

format: setup ## rewrite the sources in the project's style
	$(BIN)/ruff check --fix
	$(BIN)/ruff format
	$(BIN)/clang-format -i $(CXX_SOURCES)

bench: $(if $(GPU),setup) ## time every kernel group into benchmarks/results (needs a GPU)
ifeq ($(GPU),)
	@echo "benchmarks need a GPU, and none is visible here"
else
	$(BIN)/python -m benchmarks
endif

multi-gpu: $(if $(GPU),setup) ## check and time the collectives between several GPUs, in less than 8 minutes
ifeq ($(GPU),)
	@echo "this needs several GPUs, and none is visible here; python -m benchmarks.multi_gpu --device cpu rehearses it"
else
	$(BIN)/python -m benchmarks.multi_gpu
endif

docs: setup ## write docs/results, the README's table and the plots from benchmarks/results
	$(BIN)/python -m benchmarks.report

clean: ## remove whatever was built, .venv too
	rm -rf build dist .venv .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find src tests benchmarks tools -name __pycache__ -prune -exec rm -rf {} +

.venv/ready: pyproject.toml
	@echo "Setting up .venv: torch and build tools, a minute or two and the download of torch"
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet "$(TORCH)" scikit-build-core cmake ninja
	touch $@

# The name of the stamp says what is installed now; the objects of every setting stay in build/editable.
build/installed-%: .venv/ready $(SOURCES)
	@echo "Compiling: 1 to 4 minutes on two cores for the CPU, 5 to 10 with the CUDA binary"
	ABIDING_CUDA=$* $(BIN)/python -m pip install --quiet --no-build-isolation --editable ".[dev]"
	rm -f build/installed-*
	touch $@
