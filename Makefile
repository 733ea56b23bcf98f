# Everything starts here: `make` lists the targets. Settings: PYTHON=/path/to/python3.11  RECIPE=name

.DEFAULT_GOAL := help
BIN := .venv/bin
RECIPE ?= tiny_compatible
# Of launch, dryrun, status, logs and cancel: a file of launch/clusters or its path, and what goes with it.
CLUSTER ?= local
NAME ?= $(basename $(notdir $(RECIPE)))
LAUNCH = .venv-launch/bin/python -m launch
# Of the images.
ENGINE ?= docker
IMAGE ?= prune-opd

export HF_HUB_OFFLINE := 1
ifdef PYTHON
export PYTHON
endif

.PHONY: help setup tiny-models quickstart test setup-te-test lint format check setup-bench bench-loss bench-packing bench-reshard bench-fp8-noise clean setup-launch launch dryrun status logs cancel image image-cpu squashfs setup-slurm-test

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "  make %-15s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: ## Make .venv with the pinned packages (does nothing when it is up to date)
	@bash scripts/setup.sh

tiny-models: setup ## Train the tiny base, teacher and student into the per-user cache, unless they are there
	$(BIN)/prune-opd sft tiny_base --if-missing
	$(BIN)/prune-opd sft tiny_teacher --if-missing
	$(BIN)/prune-opd sft tiny_student --if-missing

quickstart: setup tiny-models ## Set up, train the tiny pair in runs/quickstart, evaluate, write the report
	$(BIN)/prune-opd train tiny_compatible --run-dir runs/quickstart

test: setup setup-te-test setup-launch setup-slurm-test lint tiny-models ## Set up, lint, run all tests
	$(BIN)/pytest

setup-te-test: setup ## Put Transformer Engine's Python half into .venv-te, for the tests of its layer spec
	@PYTHON=$(BIN)/python bash scripts/setup_te_test.sh

setup-slurm-test: ## Install Debian's Slurm for tests/cluster, where that is possible
	@bash scripts/setup_slurm_test.sh

lint: setup ## Lint, formatting, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup ## Format the code and apply the safe fixes of the linter
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

check: setup tiny-models ## Check RECIPE (default tiny_compatible) without training it
	$(BIN)/prune-opd check $(RECIPE)

setup-bench: setup ## Put what the benchmarks compare with (trl) into .venv-bench
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --upgrade --target .venv-bench -r requirements/bench.txt

bench-loss: setup-bench ## Measure the loss against full logits, TRL and its floor: bench/loss.json (about 20 minutes)
	$(BIN)/prune-opd bench loss

bench-packing: setup ## Measure packed against padded micro-batches: bench/packing.json
	$(BIN)/prune-opd bench packing

bench-reshard: setup ## Measure the weight stream against bare collectives and the reload: bench/reshard.json
	$(BIN)/prune-opd bench reshard

bench-fp8-noise: tiny-models ## Count the drift events that FP8 noise alone makes: bench/fp8-noise.json
	$(BIN)/prune-opd bench fp8-noise

setup-launch: ## Make .venv-launch, the small environment that submits jobs (no torch)
	@bash scripts/setup_launch.sh

# SET="key=value …" overrides settings, ARGS="--evaluate TASK --detach …" is for `python -m launch submit --help`.
SUBMIT = $(LAUNCH) submit $(RECIPE) $(SET) --cluster $(CLUSTER) $(if $(NODES),--nodes $(NODES)) $(ARGS)

launch: setup-launch ## Run RECIPE on CLUSTER and wait: the exit code is the job's (NODES=, SET=, ARGS=)
	@$(SUBMIT)

dryrun: setup-launch ## Print the scripts that `make launch` would submit; changes nothing
	@$(SUBMIT) --dry-run

status: setup-launch ## A line per job of what was launched as NAME (default: RECIPE)
	@$(LAUNCH) status $(NAME)

logs: setup-launch ## What the ranks of NAME wrote, all attempts
	@$(LAUNCH) logs $(NAME)

cancel: setup-launch ## Cancel the jobs of NAME
	@$(LAUNCH) cancel $(NAME)

image: ## Build the H100 image (ENGINE=docker, BASE=, IMAGE=)
	$(ENGINE) build -f docker/Dockerfile -t $(IMAGE) $(if $(BASE),--build-arg BASE=$(BASE)) --build-arg REVISION=$$(git rev-parse HEAD) $(BUILD_ARGS) .

image-cpu: ## Build the CPU image, IMAGE:cpu, on Debian 12 or BASE
	$(ENGINE) build -f docker/Dockerfile -t $(IMAGE):cpu --build-arg ACCEL=cpu --build-arg BASE=$(or $(BASE),debian:12) --build-arg REVISION=$$(git rev-parse HEAD) $(BUILD_ARGS) .

squashfs: ## Turn IMAGE into IMAGE.sqsh for pyxis (needs enroot)
	enroot import -o $(IMAGE).sqsh dockerd://$(IMAGE)

clean: ## Remove caches and build products (.venv, runs/ and the tiny models stay)
	rm -rf build *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find prune_opd recipes tests scripts -name __pycache__ -type d -prune -exec rm -rf {} +
