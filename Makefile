# make demo   pictures and a table in outputs/, from a fresh environment
# make test   every check CI makes, in a fresh environment
# make dev    a persistent environment in .venv; then: make lint, make types, make unit
# make constraints [TORCH=x.y.z TRITON=x.y.z]   write constraints.txt anew from the ranges in pyproject.toml
# make clean  everything made here except .venv

PYTHON ?= python3
# A file's tests share models, so that they stay together.
PYTEST_FLAGS ?= -n auto --dist loadfile
DEMO_FLAGS ?=

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.NOTPARALLEL:
.PHONY: demo test dev lint types unit constraints clean

# Chosen by hand, together: a CUDA build of torch asks for exactly one version of triton.
TORCH ?= $(shell sed -n 's/^torch==//p' constraints.txt)
TRITON ?= $(shell sed -n 's/^triton==//p' constraints.txt)

pip = $(1)/bin/python -m pip --disable-pip-version-check
install = $(call pip,$(1)) install -qq -c constraints.txt

# No test may reach the network.
test unit: export HF_HUB_OFFLINE := 1

demo:
	$(PYTHON) -m venv --clear .venv-demo
	rm -rf build  # setuptools would ship what an older tree left there
	$(call install,.venv-demo) .
	.venv-demo/bin/python demos/layout.py --out outputs $(DEMO_FLAGS)

test:
	$(PYTHON) -m venv --clear .venv-test
	$(call install,.venv-test) -e ".[dev]"
	.venv-test/bin/ruff check .
	.venv-test/bin/ruff format --check .
	.venv-test/bin/mypy attnctrl
	.venv-test/bin/python -m pytest $(PYTEST_FLAGS)

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv --clear .venv
	$(call install,.venv) -e ".[dev]"
	touch $@

dev: .venv/installed

lint: .venv/installed
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

types: .venv/installed
	.venv/bin/mypy attnctrl

unit: .venv/installed
	.venv/bin/python -m pytest $(PYTEST_FLAGS)

constraints:
	$(PYTHON) -m venv --clear .venv-pins
	$(call pip,.venv-pins) install -qq -e ".[dev]" torch==$(TORCH) triton==$(TRITON)
	{ sed -n '/^#/p' constraints.txt; \
	  $(call pip,.venv-pins) freeze --all --exclude-editable \
	  | sed -E '/^(cuda-|nvidia-|pip=|wheel=|#)/d; s/^torch( @ |==).*/torch==$(TORCH)/'; } > constraints.tmp
	mv constraints.tmp constraints.txt
	rm -rf .venv-pins

clean:
	rm -rf .venv-demo .venv-test .venv-pins *.tmp outputs build dist ./*.egg-info
	rm -rf .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find attnctrl tests demos -name __pycache__ -type d -prune -exec rm -rf {} +
