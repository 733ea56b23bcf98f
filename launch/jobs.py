"""What is to run: training, and after it export or evaluation; or a sweep of trainings. Pure data, no NeMo-Run."""

from __future__ import annotations

import itertools
import re
import shlex
from dataclasses import dataclass, replace

from launch.cluster import FROM_ENVIRONMENT, Cluster
from prune_opd.errors import ConfigError

EXIT_CODE = "the job exited with code"
RECIPES = "recipe="  # how the axis of a sweep begins that is one of recipes, not of a setting


@dataclass(frozen=True)
class Job:
    """One job: the command that each of its nodes runs, as separate words."""

    name: str
    command: tuple[str, ...]
    nodes: int
    after: str | None = None  # the job that must have succeeded

    def script(self, cluster: Cluster) -> str:
        """The bash that a node's task runs, every word quoted.

        Under Slurm `exec` leaves no shell to swallow signals, and Slurm keeps the exit code; elsewhere the script says
        it, for NeMo-Run keeps only whether it was 0.
        """
        lines = ["set -euo pipefail"]
        if cluster.kind != "slurm":  # there the batch script reads them, outside the container
            lines += secret_lines(cluster)
        if cluster.workdir:
            lines.append(f"cd {shlex.quote(cluster.workdir)}")
            lines.append('export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"')
        command = shlex.join([cluster.python, *self.command])
        if cluster.kind == "slurm":
            return "\n".join([*lines, f"exec {command}", ""])
        return "\n".join([*lines, f'{command} || {{ code=$?; echo "{EXIT_CODE} $code"; exit "$code"; }}', ""])


def secret_lines(cluster: Cluster) -> list[str]:
    """Bash that takes secrets from where they are; only their names are in it."""
    lines = []
    for name, source in sorted(cluster.secrets.items()):
        if source == FROM_ENVIRONMENT:
            lines.append(f': "${{{name}:?is not set where the job was submitted}}"')
        else:
            path = shlex.quote(source)
            lines.append(f'{name}="$(cat -- {path})" || {{ echo "error: secret {name} cannot be read" >&2; exit 1; }}')
            lines.append(f"export {name}")
    return lines


@dataclass(frozen=True)
class Request:
    """What a person asked for."""

    recipe: str
    overrides: tuple[str, ...] = ()
    run_dir: str | None = None
    evaluate: str | None = None  # a task: evaluated when training has succeeded
    samples: int = 16
    problems: int = 256
    export: str | None = None  # a folder: the last checkpoint goes there when training has succeeded
    sweep: tuple[str, ...] = ()  # dotted.key=a,b,c or recipe=a,b,c; several give the product

    @property
    def title(self) -> str:
        """The name of the experiment: the recipe's."""
        name = re.sub(r"[^A-Za-z0-9_-]+", "-", self.recipe.rsplit("/", 1)[-1].removesuffix(".py")).strip("-")
        if not name:
            raise ConfigError(f"recipe {self.recipe!r} gives no name: use letters and digits")
        return name


def plan_jobs(request: Request, cluster: Cluster) -> list[Job]:
    """The jobs of a request, each after those that it waits for."""
    points = sweep_points(request.sweep)
    if sum(axis.startswith(RECIPES) for axis in request.sweep) > 1:
        raise ConfigError("--sweep recipe=… stands there twice: a run has one recipe, so name all of them in one")
    if len(points) > 1 and (request.run_dir or request.export):
        raise ConfigError("a sweep has a run directory for each of its runs: leave out --run-dir and --export")
    return [job for i, point in enumerate(points) for job in _run_jobs(request, cluster, point, i, len(points))]


def sweep_points(sweep: tuple[str, ...]) -> list[tuple[str, ...]]:
    """`("a=1,2", "b=x,y")` → the four tuples of overrides; no sweep is one point without overrides.

    An axis `recipe=a,b` is one of recipes, by name or path: its value takes the request's recipe's place.
    """
    axes = []
    for axis in sweep:
        key, separator, values = axis.partition("=")
        if not separator or not key or not all(values.split(",")):
            raise ConfigError(f"--sweep {axis!r} is not a sweep: write it as dotted.key=value,value")
        axes.append([f"{key}={value}" for value in values.split(",")])
    return list(itertools.product(*axes))


def sweep_lines(request: Request) -> list[str]:
    """Which run of a sweep is which: a line each, empty where there is one run only."""
    points = [_recipe_of(point, request.recipe) for point in sweep_points(request.sweep)]
    return [f"train-{i}: {' '.join([recipe, *rest])}" for i, (recipe, rest) in enumerate(points) if len(points) > 1]


def _recipe_of(point: tuple[str, ...], recipe: str) -> tuple[str, tuple[str, ...]]:
    """The recipe of a sweep's point, and the overrides that are left."""
    named = [value.removeprefix(RECIPES) for value in point if value.startswith(RECIPES)]
    return (named or [recipe])[0], tuple(value for value in point if not value.startswith(RECIPES))


def _run_jobs(request: Request, cluster: Cluster, point: tuple[str, ...], i: int, count: int) -> list[Job]:
    suffix = f"-{i}" if count > 1 else ""
    run_dir = request.run_dir or f"{cluster.run_root}/{request.title}{suffix}"
    recipe, overrides = _recipe_of(point, request.recipe)
    train = Job(
        name=f"train{suffix}",
        command=(
            *("-m", "prune_opd.ranks.node", "--ranks", str(cluster.ranks_per_node), "--run-dir", run_dir),
            *(recipe, *request.overrides, *overrides),
        ),
        nodes=cluster.nodes,
    )
    jobs = [train]
    then = Job(name="", command=(), nodes=1, after=train.name)
    if request.export:
        command = ("-m", "prune_opd.ranks.node", "--export-to", request.export, "--run-dir", run_dir, recipe)
        jobs.append(replace(then, name=f"export{suffix}", command=command))
    if request.evaluate:
        # fmt: off
        command = (
            "-m", "prune_opd.cli", "eval", f"{run_dir}/hf", "--task", request.evaluate,
            "-k", str(request.samples), "--problems", str(request.problems), "--nproc", str(cluster.ranks_per_node),
        )
        # fmt: on
        jobs.append(replace(then, name=f"evaluate{suffix}", command=command))
    return jobs
