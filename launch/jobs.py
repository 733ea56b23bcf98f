"""What is to run: training, and after it export or evaluation; or a sweep of trainings. Pure data, no NeMo-Run."""

from __future__ import annotations

import itertools
import re
import shlex
from dataclasses import dataclass, replace

from launch.cluster import FROM_ENVIRONMENT, Cluster
from prune_opd.errors import ConfigError

EXIT_CODE = "the job exited with code"
RECIPES = "recipe="  # a sweep's axis that begins like this is one of recipes, not of a setting


@dataclass(frozen=True)
class Job:
    """One job: the command that each of its nodes runs, as separate arguments."""

    name: str
    command: tuple[str, ...]
    nodes: int
    after: str | None = None  # the job that must have succeeded

    def script(self, cluster: Cluster) -> str:
        """The bash that a node's task runs, with every argument quoted.

        Under Slurm `exec` leaves no shell that could swallow signals, and Slurm keeps the exit code. Elsewhere the
        script prints the code, since NeMo-Run only keeps whether it was 0.
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
    """Bash lines that read the secrets; only their names and places are in it."""
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
class Submission:
    """What the user asked for."""

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


def plan_jobs(submission: Submission, cluster: Cluster) -> list[Job]:
    """The jobs of a submission, each after those that it waits for."""
    points = sweep_points(submission.sweep)
    if sum(axis.startswith(RECIPES) for axis in submission.sweep) > 1:
        raise ConfigError("--sweep recipe=… stands there twice: a run has one recipe, so name all of them in one")
    if len(points) > 1 and (submission.run_dir or submission.export):
        raise ConfigError("a sweep has a run directory for each of its runs: leave out --run-dir and --export")
    return [job for i, point in enumerate(points) for job in _run_jobs(submission, cluster, point, i, len(points))]


def sweep_points(sweep: tuple[str, ...]) -> list[tuple[str, ...]]:
    """`("a=1,2", "b=x,y")` → the four tuples of overrides; without a sweep, one point without overrides.

    The values of an axis `recipe=a,b` are recipes, by name or path, instead of the submission's own.
    """
    axes = []
    for axis in sweep:
        key, separator, values = axis.partition("=")
        if not separator or not key or not all(values.split(",")):
            raise ConfigError(f"--sweep {axis!r} is not a sweep: write it as dotted.key=value,value")
        axes.append([f"{key}={value}" for value in values.split(",")])
    return list(itertools.product(*axes))


def sweep_lines(submission: Submission) -> list[str]:
    """A line for each run of a sweep that says what it runs; empty if there is only one run."""
    points = [_recipe_of(point, submission.recipe) for point in sweep_points(submission.sweep)]
    return [f"train-{i}: {' '.join([recipe, *rest])}" for i, (recipe, rest) in enumerate(points) if len(points) > 1]


def _recipe_of(point: tuple[str, ...], recipe: str) -> tuple[str, tuple[str, ...]]:
    """The recipe of a sweep's point, and the overrides that are left."""
    named = [value.removeprefix(RECIPES) for value in point if value.startswith(RECIPES)]
    return (named or [recipe])[0], tuple(value for value in point if not value.startswith(RECIPES))


def _run_jobs(submission: Submission, cluster: Cluster, point: tuple[str, ...], i: int, count: int) -> list[Job]:
    suffix = f"-{i}" if count > 1 else ""
    run_dir = submission.run_dir or f"{cluster.run_root}/{submission.title}{suffix}"
    recipe, overrides = _recipe_of(point, submission.recipe)
    train = Job(
        name=f"train{suffix}",
        command=(
            *("-m", "prune_opd.ranks.node", "--ranks", str(cluster.ranks_per_node), "--run-dir", run_dir),
            *(recipe, *submission.overrides, *overrides),
        ),
        nodes=cluster.nodes,
    )
    jobs = [train]
    then = Job(name="", command=(), nodes=1, after=train.name)
    if submission.export:
        command = ("-m", "prune_opd.ranks.node", "--export-to", submission.export, "--run-dir", run_dir, recipe)
        jobs.append(replace(then, name=f"export{suffix}", command=command))
    if submission.evaluate:
        # fmt: off
        command = (
            "-m", "prune_opd.cli", "eval", f"{run_dir}/hf", "--task", submission.evaluate,
            "-k", str(submission.samples), "--problems", str(submission.problems),
            "--nproc", str(cluster.ranks_per_node),
        )
        # fmt: on
        jobs.append(replace(then, name=f"evaluate{suffix}", command=command))
    return jobs
