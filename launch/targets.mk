# Jobs on a cluster and images; included by the Makefile.

# Of launch, dryrun, status, logs and cancel: a file of launch/clusters or its path, and what goes with it.
CLUSTER ?= local
NAME ?= $(basename $(notdir $(RECIPE)))
LAUNCH = .venv-launch/bin/python -m launch
# Of the images.
ENGINE ?= docker
IMAGE ?= prune-opd

.PHONY: setup-launch setup-slurm-test launch dryrun status logs cancel image image-cpu rootfs-cpu squashfs

setup-slurm-test: ## Install Debian's Slurm for tests/cluster, where that is possible
	@bash scripts/setup_slurm_test.sh

setup-launch: ## Make .venv-launch, the small environment that submits jobs (no torch)
	@bash scripts/setup_small.sh launch

# SET="key=value …" overrides settings, ARGS="--evaluate TASK --detach …" is for `python -m launch submit --help`.
SUBMIT = $(LAUNCH) submit $(RECIPE) $(SET) --cluster $(CLUSTER) $(if $(NODES),--nodes $(NODES)) $(if $(RANKS),--ranks $(RANKS)) $(ARGS)

launch: setup-launch ## Run RECIPE on CLUSTER and wait: the exit code is the job's (NODES=, RANKS=, SET=, ARGS=)
	@$(SUBMIT)

dryrun: setup-launch ## Print what `make launch` would do, as a script; changes nothing
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

rootfs-cpu: ## Build build/rootfs-cpu from docker/Dockerfile, for tests/cluster (root, buildah, mmdebstrap; BASE=)
	@bash scripts/build_rootfs.sh

squashfs: ## Turn IMAGE into IMAGE.sqsh for pyxis (needs enroot)
	enroot import -o $(IMAGE).sqsh dockerd://$(IMAGE)
