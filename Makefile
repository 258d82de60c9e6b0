# Each target sets up what it needs: Python 3.11+ and make are enough.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
OPENRLHF_ENV ?= $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/next-core/openrlhf-venv
DISTRIBUTED_ENV ?= $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/next-core/distributed-venv
VLLM_ENV ?= $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/next-core/vllm-venv
VERL_ENV ?= $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/next-core/verl-venv
export OPENRLHF_ENV DISTRIBUTED_ENV VLLM_ENV VERL_ENV
export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: quickstart test test-processes test-base test-packaging test-crash openrlhf-env test-openrlhf distributed-env test-distributed vllm-env test-vllm verl-env test-verl test-pages fuzz bench-speed tables pictures docs lint setup clean help

# A proof that takes minutes: the hash of what it covers is recorded when it passes, and .ci/run looks at the records.
define proof
@proved=$$($(PYTHON) tests/proved.py $@) && $(1) && echo $$proved > tests/proofs/$@.sha256
endef

help:  ## List the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

$(STAMP): pyproject.toml constraints.txt
	@echo "Setting up $(VENV) (once; again only when pyproject.toml or constraints.txt change)"
	@$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "next-core needs Python 3.11 or newer; call make with PYTHON=python3.11")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch==2.13.0
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $(STAMP)

setup: $(STAMP)  ## Make the environment (.venv)

quickstart: $(STAMP)  ## Train the embedded task with jumps, and the plain run beside it
	$(BIN)/next-core run examples/quickstart.yaml --out runs/quickstart --overwrite

test: $(STAMP)  ## Run the tests, a process for each core
	$(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder

test-processes: $(STAMP)  ## Train with the callback in two processes, kill each, and compare the ranks (minutes)
	$(call proof,$(BIN)/python -m pytest -m processes tests/backends/trl)

test-base: $(STAMP)  ## Make the arithmetic base model again and compare its accuracy (a minute and a half)
	$(call proof,$(BIN)/python -m pytest -m base_model tests/examples)

test-packaging: $(STAMP)  ## Build the wheel, install it and a third party's plug-in in an empty environment (minutes)
	$(call proof,$(BIN)/python -m pytest -m packaging tests/packaging)

test-crash: $(STAMP)  ## Kill real runs at every kind of write and at 200 random moments (minutes)
	$(call proof,$(BIN)/python -m pytest -m crash tests/crash)

openrlhf-env:  ## Make the environment of the real OpenRLHF on the CPU, outside the tree (3 GB; some 5 minutes, once)
	@$(PYTHON) -m tests.backends.openrlhf.cpu.make_env "$(OPENRLHF_ENV)"

test-openrlhf: $(STAMP) openrlhf-env  ## Run the tests that train with the real OpenRLHF on the CPU (minutes)
	$(call proof,$(BIN)/python -m pytest -m openrlhf tests/backends/openrlhf)

distributed-env:  ## Make the environment of TRL under DeepSpeed on the CPU, outside the tree (1.7 GB; some 3 minutes, once)
	@$(PYTHON) -m tests.backends.trl.distributed.make_env "$(DISTRIBUTED_ENV)"

test-distributed: $(STAMP) distributed-env  ## Train with the callback under ZeRO-1, 2, 3 and FSDP2, in two processes (minutes)
	$(call proof,$(BIN)/python -m pytest -m distributed tests/backends/trl)

vllm-env:  ## Make the environment of TRL with vLLM on the CPU, outside the tree (3 GB; some 4 minutes, once)
	@$(PYTHON) -m tests.backends.trl.vllm.make_env "$(VLLM_ENV)"

test-vllm: $(STAMP) vllm-env  ## Train with the callback while vLLM generates, in the trainer's process and on a server (minutes)
	$(call proof,$(BIN)/python -m pytest -m vllm tests/backends/trl)

verl-env:  ## Make the environment of the real verl on the CPU, outside the tree (3 GB; some 5 minutes, once)
	@$(PYTHON) -m tests.backends.verl.cpu.make_env "$(VERL_ENV)"

test-verl: $(STAMP) verl-env  ## Train with the real verl on the CPU, read what it saves, and let it load what we write (minutes)
	$(call proof,$(BIN)/python -m pytest -m verl tests/sources/verl tests/backends/verl)

test-pages: $(STAMP)  ## Look at reports in Chromium, light and dark, wide and narrow (a minute; needs chromium)
	$(call proof,$(BIN)/python -m pytest -m pages tests/report)

fuzz: $(STAMP)  ## Read 100,000 damaged files, extrapolate 500 random adapters, write every layout with every predictor (minutes)
	$(call proof,$(BIN)/python -m tests.fuzz && $(BIN)/python -m tests.fuzz.adapters && $(BIN)/python -m tests.appliers.matrix --check)

bench-speed: $(STAMP)  ## Measure every stage of docs/benchmarks/speed.md and write its table (a quarter of an hour, 15 GB of scratch)
	$(BIN)/python -m benchmarks.speed all

tables: $(STAMP)  ## Write the tables of docs/benchmarks anew from the committed results; runs nothing
	$(BIN)/python benchmarks/tables.py

pictures: $(STAMP)  ## Draw the pictures of docs/images anew from the committed results; runs nothing
	$(BIN)/python benchmarks/pictures.py

docs: $(STAMP)  ## Build the site into docs/_build/html; a warning is an error
	$(BIN)/sphinx-build -q -W --keep-going -n -d docs/_build/doctrees docs docs/_build/html

lint: $(STAMP)  ## ruff, mypy --strict, and the layers (import-linter)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

clean:  ## Remove the environment and what runs left
	rm -rf $(VENV) runs dist build docs/_build .mypy_cache .ruff_cache .hypothesis
