# mvrepro: type `make help`. Each command builds the environment (.venv) itself when it is missing.
PROFILE ?= quick
NB ?=
FORCE ?=
JOBS ?=
SAMPLE ?=
PAGES ?=
PORT ?= 8000
REPO ?=
MINUTES ?= 10
OUT ?= scratch/gpu
DEVICE ?= cuda
TINY ?=

# Nothing is saved by itself there: what is committed stays as it is.
LAB := "--ServerApp.root_dir=$(CURDIR)" "--LabApp.default_url=/lab/tree/docs/play.md?file-browser-path=/notebooks"

VENV := .venv
BOOK := .venv-book
BIN := $(VENV)/bin
PYTHON ?= $(shell command -v python3.11 || command -v python3)
MVREPRO := $(BIN)/python -m mvrepro
NOTEBOOK := $(if $(NB),--notebook $(NB))

# The tree that you stand in is the one that runs, also with an environment of your own (BIN=).
export PYTHONPATH := $(CURDIR)
# What must be set before the numerical libraries start (mvrepro/determinism.py says why).
export ATEN_CPU_CAPABILITY := avx2
export ONEDNN_MAX_CPU_ISA := AVX2
export MKL_CBWR := COMPATIBLE
export CUBLAS_WORKSPACE_CONFIG := :4096:8
export PYTHONHASHSEED := 0
# DVC must neither phone home nor depend on a global configuration.
export DVC_NO_ANALYTICS := 1

.DEFAULT_GOAL := help
.PHONY: help env reproduce status validate figures test test-hard audit lint lab book serve test-book test-extras badges gpu gpu-pack clean clean-env

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo
	@echo "  PROFILE=quick (default) or faces   NB=04 one notebook   FORCE=1 compute again   JOBS=2 side by side   SAMPLE=6 only so many of the runs   PAGES=1 the notebooks on committed runs"

env: $(if $(filter file,$(origin BIN)),$(VENV)/.ready) ## build .venv from requirements.lock (not with BIN=, an environment of your own)

# $(call venv,FOLDER,REQUIREMENTS,COST): a virtual environment of pinned packages
define venv
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null || { \
	  echo "mvrepro: the locked environment needs Python 3.11, found $$($(PYTHON) --version 2>&1 || echo none): install python3.11 or say make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@echo "building $(1) from $(2) (once; about $(3))"
	@$(PYTHON) -m venv $(1) || { echo "mvrepro: could not make a virtual environment: on Debian and Ubuntu, install python3.11-venv" >&2; exit 1; }
	@$(1)/bin/python -m pip install -q -q --disable-pip-version-check -r $(2)
endef

$(VENV)/.ready: requirements.lock
	$(call venv,$(VENV),$<,2 minutes and 2 GB)
	@# where this tree lies, for notebooks that are opened without make
	@$(BIN)/python -m pip install -q -q --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

$(BOOK)/.ready: requirements-book.lock
	$(call venv,$(BOOK),$<,1 minute and 0.3 GB)
	@touch $@

reproduce: env ## compute what of PROFILE was not yet computed here, and compare with the committed values
	@$(MVREPRO) reproduce --profile $(PROFILE) $(NOTEBOOK) $(if $(filter-out 0,$(FORCE)),--force) $(if $(JOBS),--jobs $(JOBS)) $(if $(SAMPLE),--sample $(SAMPLE)) $(if $(filter-out 0,$(PAGES)),--pages)

status: env ## which committed results no longer belong to the files that are here, of all profiles
	@$(MVREPRO) status

validate: env ## re-execute the committed notebooks strictly; check everything that is generated
	@$(MVREPRO) validate --profile $(PROFILE) $(NOTEBOOK)

figures: env ## every figure of PROFILE as PNG and PDF in build/figures (NB=04: of one notebook)
	@for page in $(or $(NB),$(notdir $(wildcard results/executed/$(PROFILE)/*.ipynb))); do \
	  $(MVREPRO) notebook $$page --profile $(PROFILE) --out build || exit 1; done

test: env ## the tests
	@$(BIN)/python -m pytest -q -n 2 --dist loadgroup -m "not slow" tests

test-hard: env ## at night: 1,000 damaged files of each kind, every hostile command line, and the slow tests
	@FUZZ=1000 HOSTILE=1 KILLS=30 $(BIN)/python -m pytest -q -n 2 --dist loadgroup tests/test_fuzz.py tests/test_hostile.py tests/test_wheel.py tests/test_faults.py

audit: env ## which pinned packages have known vulnerabilities, by pip-audit (needs a network)
	@$(BIN)/python -m pip install -q -q --disable-pip-version-check -r requirements-dev.txt
	@for file in requirements.lock requirements-book.lock requirements-extras.txt; do \
	  if said=$$($(BIN)/python -m pip_audit --strict --no-deps --disable-pip --progress-spinner off -r $$file 2>&1); then echo "$$file: nothing known"; else \
	    case "$$said" in *"could not be audited"*|*Connection*|*HTTPError*|*Timeout*) \
	      echo "mvrepro: $$file can't be audited: the public index does not answer here as pip-audit asks it; call \`make audit\` where it does" >&2; exit 2;; esac; \
	    echo "$$file:"; echo "$$said"; failed=1; fi; done; exit $${failed:-0}

lint: env ## ruff, mypy and who may import whom, as pre-commit runs them
	@$(BIN)/python -m pip install -q -q --disable-pip-version-check -r requirements-dev.txt
	@$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy && $(BIN)/lint-imports --no-cache

lab: env ## open the notebooks in JupyterLab, on a page that says how to play with them
	@JUPYTER_CONFIG_PATH="$(CURDIR)/docs/lab" $(BIN)/jupyter lab $(LAB)

book: $(BOOK)/.ready ## the executed notebooks as an offline site: build/book/index.html
	@$(BOOK)/bin/python docs/build.py
	@echo "build/book/index.html"

serve: book ## the book in a browser on this machine (PORT=8000)
	@$(BOOK)/bin/python docs/serve.py $(PORT)

test-book: env book ## the book's tests, in a real browser (Chromium)
	@$(BIN)/python -m pip install -q -q --disable-pip-version-check -r requirements-book-test.txt
	@$(BIN)/python -m pytest -q -n 2 tests/book

badges: env ## Binder and Colab badges in README for REPO=owner/name on GitHub (default: the remote origin)
	@$(BIN)/python docs/badges.py $(REPO)

test-extras: env ## the tests that need optional packages (alignment, ONNX, downloads, TensorBoard, other heads), and the wheel's
	@$(BIN)/python -m pip install -q -q --disable-pip-version-check -r requirements-extras.txt
	@$(BIN)/python -m pytest -q -n 2 --dist loadgroup -m "extra or slow" tests

# Without an environment of the project's own: torch, numpy, scipy, pillow, safetensors, pyyaml, tqdm and pytest do.
GPU := $(or $(wildcard $(BIN)/python),python3) -m benchmarks gpu

gpu: ## all that a GPU is wanted for: tests, the head, the loop, evidence (MINUTES=10 OUT=scratch/gpu DEVICE=cuda TINY=)
	@$(GPU) --minutes $(MINUTES) --out "$(OUT)" --device $(DEVICE) $(if $(filter-out 0,$(TINY)),--tiny)

gpu-pack: ## the photographs that its evidence is made of, small, in one file: build/gpu-pack.zip
	@$(GPU) --write-pack

clean: ## remove what this machine remembers, the book and scratch runs; committed results stay
	rm -rf .mvrepro build scratch .pytest_cache .mypy_cache .ruff_cache .hypothesis

clean-env: ## remove .venv and .venv-book
	rm -rf $(VENV) $(BOOK)
