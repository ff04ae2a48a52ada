# make demo   what foldcp does, on a CPU: stock Boltz's structure, in less memory (under 4 minutes)
# make quick  tests that start no process and need no Boltz
# make test   all tests, two at a time
# make lint   format, mistakes, types, spelling and docstrings; clang-format for C++
# make docs   the documentation, site/ (mkdocs); rewrites its generated parts first
# make bench  the tables behind the documentation (about 30 minutes); writes bench/results
# make setup  only the environment, .venv; the other targets call it
# make cueq-python  cuEquivariance's Python for its contract test, which skips without
#
# PYTHON=python3.12      interpreter for .venv (3.10 to 3.12)
# TORCH_INDEX=URL        package index for torch alone; https://download.pytorch.org/whl/cpu holds a
#                        build without CUDA that is a tenth of the size
# DEMO="--size real"     arguments of the demo, see .venv/bin/python -m bench.demo --help

SHELL := /bin/bash
.DEFAULT_GOAL := demo
.PHONY: setup demo quick test lint docs bench cueq-python clean

TORCH := torch==2.13.0
TORCH_INDEX ?=
DEMO ?=
# In a folder of its own: no test but the one of the contract finds it.
CUEQ := cuequivariance-torch==0.13.0 cuequivariance==0.13.0 cuequivariance-ops-torch-cu13==0.13.0 \
	cuequivariance-ops-cu13==0.13.0 opt-einsum==3.4.0 nvidia-ml-py==13.615.71
# Tests marked `timed` bound how long ranks take, and run by themselves; all are in these files.
TIMED := tests/runs/test_faults.py tests/fabric/test_exchange.py
# Two files at a time, in the order of their names; the slowest tests are listed.
SHARED := -n 2 --dist loadfile --no-loadscope-reorder --durations=20 --maxfail=10
SUPPORTED := import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 13))
PYTHON ?= $(shell for p in python3 python3.12 python3.11 python3.10; do \
	$$p -c "$(SUPPORTED)" 2>/dev/null && echo $$p && break; done)
PY := .venv/bin/python
PIP := $(PY) -m pip install --quiet --disable-pip-version-check

setup: .venv/.ready

$(PY):
	@[ -n "$(PYTHON)" ] || { echo "no Python 3.10 to 3.12 found; name one with make PYTHON=..."; exit 1; }
	@$(PYTHON) -c "$(SUPPORTED)" || { echo "$(PYTHON) is not Python 3.10 to 3.12, which Boltz needs"; exit 1; }
	@$(PYTHON) -m venv .venv || { rm -rf .venv; \
		echo "python venv failed; on Debian and Ubuntu: apt-get install python3-venv"; exit 1; }

# torch first: builds of other packages look for it.
.venv/.ready: $(PY) constraints.txt pyproject.toml setup.py toolchain.py $(shell find csrc -type f)
	@echo "installing torch, Boltz and foldcp into .venv, and compiling its extension"
	@$(PIP) $(TORCH) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX))
	@$(PIP) -c constraints.txt setuptools wheel
	@$(PIP) -c constraints.txt boltz==2.2.1 pytest pytest-xdist ruff mypy codespell \
		clang-format triton matplotlib
	@$(PIP) -c constraints.txt -e . --no-build-isolation
	@touch $@

demo: setup
	@$(PY) -m bench.demo $(DEMO)

quick: setup
	@$(PY) -m pytest tests/unit tests/kernels -m "not process and not boltz" --without-boltz $(SHARED)

test: setup
	@$(PY) -m pytest tests -m "not timed" $(SHARED)
	@$(PY) -m pytest $(TIMED) -m timed --maxfail=10

lint: setup
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check --quiet .
	@$(PY) tests/lint/docstrings.py
	@git ls-files -z -- . ':!bench/results' ':!*.png' ':!*.svg' ':!*.cif' ':!*.a3m' | \
		xargs -0 .venv/bin/codespell
	@$(PY) tests/lint/typing_gate.py
	@.venv/bin/clang-format --dry-run --Werror $$(find csrc tests/native -type f)

.venv/.docs: .venv/.ready
	@echo "installing mkdocs into .venv"
	@$(PIP) -c constraints.txt mkdocs-material 'mkdocstrings[python]'
	@touch $@

docs: .venv/.docs
	@$(PY) -m bench.pages
	@NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict
	@echo "site/index.html"

cueq-python: .venv/cuequivariance/.ready

# The compiled part is for GPUs, and deleted.
.venv/cuequivariance/.ready: Makefile | $(PY)
	@echo "installing the Python of cuEquivariance into .venv/cuequivariance"
	@rm -rf $(@D)
	@$(PIP) --no-deps --no-compile --target $(@D) $(CUEQ)
	@find $(@D) -name '*.so' -delete
	@touch $@

bench: setup
	@set -e; for name in roofline aot native bytes_moved live_memory mesh_memory tile_memory \
		transports planning loading cpu_vs_stock; do $(PY) -m bench.$$name; done
	@$(PY) -m bench.rings_model --out bench/results
	@$(PY) -m bench.rings --out "$$($(PY) -c \
		'from bench.machine import results_folder; print(results_folder() / "rings")')"

clean:
	rm -rf .venv .demo site build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache
