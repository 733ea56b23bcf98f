"""What a recipe asks of a cluster, and what is known of that before anything is submitted.

    recipe + overrides ─▶ check --structure ─▶ Wish: nodes, ranks, planned seconds, models ─▶ one line, and sbatch

The recipe is loaded here as the job will load it: with the variables of the cluster file.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from launch.cluster import Cluster
from launch.jobs import Submission, recipe_of, sweep_points
from launch.places import behind, place_problems
from prune_opd.check.run import check_structure
from prune_opd.config import TrainConfig
from prune_opd.config.paths import shipped_models_dir
from prune_opd.config.recipe import load_recipe
from prune_opd.errors import ConfigError, UserError
from prune_opd.plan.counts import parameters
from prune_opd.plan.memory import MASTERS_AND_MOMENTS
from prune_opd.plan.planner import Plan, plan_run
from prune_opd.plan.setting import WEIGHT_BYTES

LEAVE = 150  # seconds: nodes that have saved wait for one another (ranks/node.py, at most 90), and a margin
DISK = 1e9  # bytes/s that a node writes of a checkpoint. Assumed
UNPLANNED = 300  # seconds before the end, where nothing is planned (a CPU)


@dataclass(frozen=True)
class Wish:
    """One run: its config, what it takes, and what the planner says of it. plan: None on a CPU."""

    recipe: str
    config: TrainConfig
    nodes: int
    ranks: int  # on each node
    plan: Plan | None

    @property
    def signal(self) -> int:
        """Seconds before the time limit in which a step and a checkpoint can end, at the full horizon."""
        if self.plan is None:
            return UNPLANNED
        setting = self.plan.setting
        size = parameters(setting.student) * (WEIGHT_BYTES[self.config.precision.params] + MASTERS_AND_MOMENTS)
        seconds = self.plan.full.total + size / (DISK * self.nodes) + LEAVE
        return math.ceil(seconds / 30) * 30


def wishes(submission: Submission, cluster: Cluster, nodes: int | None, ranks: int | None) -> list[Wish]:
    """What every run of a submission takes: told, else as the cluster file says, else as the recipe does.

    Raises UserError for a recipe, a setting or a file that is not there, and for what `check --structure` refuses.
    """
    if problems := place_problems(submission, cluster):
        raise ConfigError("\n".join(problems))
    found = []
    with _environment(cluster.environment):
        for point in sweep_points(submission.sweep):
            name, overrides = recipe_of(point, submission.recipe)
            config = load_recipe(name, [*submission.overrides, *overrides])
            if not isinstance(config, TrainConfig):
                raise ConfigError(f"recipe {name!r} is not for training: run `prune-opd sft {name}` on this machine")
            n = nodes or cluster.nodes or (config.planning.nodes if cluster.kind == "slurm" else 1)
            r = ranks or cluster.ranks_per_node or config.parallel.nproc
            if problems := check_structure(config, n * r):
                raise UserError("\n".join(dict.fromkeys(problems)))
            gpu = config.planning.gpu
            if gpu != "cpu" and r > (cluster.gpus_per_node or r):
                raise ConfigError(
                    f"{r} ranks a node and gpus_per_node = {cluster.gpus_per_node}: every rank takes a GPU, so set "
                    f"RANKS={cluster.gpus_per_node} (--ranks) with more NODES, or give the job more GPUs"
                )
            planned = replace(config, parallel=replace(config.parallel, nproc=r))
            found.append(Wish(name, config, n, r, None if gpu == "cpu" else plan_run(planned, gpu, n)))
    return found


def settled(cluster: Cluster, wish: Wish) -> Cluster:
    """The cluster with the nodes, ranks and signal of a run. Raises ConfigError if no step fits into the time limit."""
    early = wish.signal if cluster.signal_before_end is None else cluster.signal_before_end
    if cluster.kind == "slurm" and wish.plan is not None and seconds_of(cluster.time) < early + wish.plan.full.total:
        raise ConfigError(
            f"time = {cluster.time!r}: a step takes {wish.plan.full.total:.0f} s and the run saves {early} s before "
            "the end, so no step would end: give the job more time"
        )
    return replace(cluster, nodes=wish.nodes, ranks_per_node=wish.ranks, signal_before_end=early)


def describe(wish: Wish, cluster: Cluster) -> str:
    """The one line before sbatch: nodes × ranks, the recipe's wish, planned hours, mounts, models."""
    own = (wish.config.planning.nodes, wish.config.parallel.nproc)
    parts = [f"{wish.nodes} node{'s' if wish.nodes > 1 else ''} × {wish.ranks} ranks"]
    parts[0] += " as the recipe has it" if own == (wish.nodes, wish.ranks) else f" (the recipe: {own[0]} × {own[1]})"
    if wish.plan is not None:
        hours = wish.plan.hours(wish.plan.planned)
        fits = "" if not wish.plan.problems else ", which does NOT fit: see `prune-opd plan`"
        parts.append(f"planned {hours:.1f} h on {wish.plan.setting.gpu.name}{fits}")
        if cluster.kind == "slurm":
            jobs = math.ceil(hours * 3600 / max(seconds_of(cluster.time) - wish.signal, 1))
            parts.append(
                f"in {jobs} job{'s' if jobs > 1 else ''} of {cluster.time}, saved {wish.signal} s before each end"
            )
    if cluster.container_mounts:
        parts.append(f"mounts {', '.join(mount.split(':')[1] for mount in cluster.container_mounts)}")
    parts += [f"{role} {_presence(directory, cluster)}" for role, directory in wish.config.model_dirs.items()]
    return f"{wish.recipe}: {'; '.join(parts)}"


def _presence(model: str, cluster: Cluster) -> str:
    """Whether a model is where the job will look for it, as far as this machine can tell."""
    if shipped_models_dir() in Path(model).parents:
        return "comes with the package"
    here: str | None = model
    if cluster.container_image:
        here = behind(model, cluster)
        if here is None:
            return f"{model} is under no mount" if model.startswith("/") else f"{model} is relative: not in the image"
    elif cluster.workdir and not Path(model).is_absolute():
        here = f"{cluster.workdir}/{model}"
    if cluster.ssh is None and Path(here, "config.json").is_file():
        return f"{model} present"
    return f"{model} not checkable from here" if cluster.ssh or cluster.kind == "slurm" else f"{model} ABSENT"


def seconds_of(limit: str) -> int:
    """Slurm's [days-]HH:MM:SS."""
    days, _, clock = limit.rpartition("-")
    hours, minutes, seconds = map(int, clock.split(":"))
    return int(days or 0) * 86400 + hours * 3600 + minutes * 60 + seconds


@contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(variables)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
