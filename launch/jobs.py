"""What is to run: training, and after it export or evaluation; or a sweep of trainings. Pure data, no NeMo-Run."""

from __future__ import annotations

import itertools
import re
import shlex
from dataclasses import dataclass, replace
from pathlib import Path

from launch.cluster import FROM_ENVIRONMENT, Cluster
from prune_opd.errors import ConfigError

CODE = "code"  # NeMo-Run's folder in a job's folder: what a packager brings, and where the job starts
BROUGHT = "brought:"  # before the name of a file that a job brings along
EXIT_CODE = "the job exited with code"
RECIPES = "recipe="  # a sweep's axis that begins like this is one of recipes, not of a setting


@dataclass(frozen=True)
class Job:
    """One job: the command that each of its nodes runs, as separate arguments."""

    name: str
    command: tuple[str, ...]
    nodes: int
    after: str | None = None  # the job that must have succeeded
    label: str = ""  # recipe and run, in the name that squeue shows
    files: tuple[tuple[str, str], ...] = ()  # name and text of what the job brings along: an own recipe

    def script(self, cluster: Cluster) -> str:
        """The bash that a node's task runs, with every argument quoted.

        Under Slurm `exec` leaves no shell that could swallow signals, and Slurm keeps the exit code. Elsewhere the
        script prints the code, since NeMo-Run only keeps whether it was 0.
        """
        lines = ["set -euo pipefail"]
        if cluster.kind != "slurm":  # there the batch script reads them, outside the container
            lines += secret_lines(cluster)
        if self.files:  # beside the folder of this script, whatever the job's folder is called there
            code = f'"$(dirname -- "$0")/../{CODE}"'
            lines += [f"mkdir -p -- {code}"] if cluster.kind == "local" else []
            lines.append(f'brought="$(cd -- {code} && pwd)"')
        for name, text in self.files if cluster.kind == "local" else ():  # NeMo-Run packages nothing for this machine
            end = end_of(text)
            lines += [f"cat >\"$brought\"/{shlex.quote(name)} <<'{end}'", text.removesuffix("\n"), end]
        if cluster.workdir:
            lines.append(f"cd {shlex.quote(cluster.workdir)}")
            lines.append('export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"')
        command = " ".join(map(self._quoted, [cluster.python, *self.command]))
        if cluster.kind == "slurm":
            return "\n".join([*lines, f"exec {command}", ""])
        return "\n".join([*lines, f'{command} || {{ code=$?; echo "{EXIT_CODE} $code"; exit "$code"; }}', ""])

    def _quoted(self, word: str) -> str:
        """A word for the shell; what the job brings along lies in the folder `code` of the job."""
        if word.startswith(BROUGHT):
            return f'"$brought"/{shlex.quote(word.removeprefix(BROUGHT))}'
        return shlex.quote(word)


def end_of(text: str) -> str:
    """A line that is not in the text: where it ends."""
    end = "END_OF_FILE"
    while end in text.splitlines():
        end += "_"
    return end


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
        return title_of(self.recipe)


def title_of(recipe: str) -> str:
    """A recipe's name for jobs and folders; of a run's config.yaml, the run's. Raises ConfigError if none is left."""
    path = recipe.removesuffix("/config.yaml").removesuffix(".py").removesuffix(".yaml").rstrip("/")
    name = re.sub(r"[^A-Za-z0-9_-]+", "-", path.rsplit("/", 1)[-1]).strip("-")
    if not name:
        raise ConfigError(f"recipe {recipe!r} gives no name: use letters and digits")
    return name


def plan_jobs(submission: Submission, clusters: Cluster | list[Cluster]) -> list[Job]:
    """The jobs of a submission, each after those that it waits for. clusters: one for all runs, or one for each."""
    points = sweep_points(submission.sweep)
    if sum(axis.startswith(RECIPES) for axis in submission.sweep) > 1:
        raise ConfigError("--sweep recipe=… stands there twice: a run has one recipe, so name all of them in one")
    if len(points) > 1 and (submission.run_dir or submission.export):
        raise ConfigError("a sweep has a run directory for each of its runs: leave out --run-dir and --export")
    of_point = clusters if isinstance(clusters, list) else [clusters] * len(points)
    return [job for i, point in enumerate(points) for job in _run_jobs(submission, of_point[i], point, i, len(points))]


def sweep_points(sweep: tuple[str, ...]) -> list[tuple[str, ...]]:
    """`("a=1,2", "b=x,y")` → the four tuples of overrides; without a sweep, one point without overrides.

    The values of an axis `recipe=a,b` are recipes, by name or path, instead of the submission's own.
    """
    axes = []
    for axis in sweep:
        key, separator, values = axis.partition("=")
        if not separator or not key or not all(values.split(",")):
            raise ConfigError(f"--sweep {axis!r} is not a sweep: write it as dotted.key=value,value")
        if values.startswith("["):
            raise ConfigError(f"--sweep {axis!r}: its values stand without brackets, {key}={values.strip('[]')}")
        axes.append([f"{key}={value}" for value in values.split(",")])
    return list(itertools.product(*axes))


def sweep_lines(submission: Submission) -> list[str]:
    """A line for each run of a sweep that says what it runs; empty if there is only one run."""
    points = [recipe_of(point, submission.recipe) for point in sweep_points(submission.sweep)]
    return [f"train-{i}: {' '.join([recipe, *rest])}" for i, (recipe, rest) in enumerate(points) if len(points) > 1]


def recipe_of(point: tuple[str, ...], recipe: str) -> tuple[str, tuple[str, ...]]:
    """The recipe of a sweep's point, and the overrides that are left."""
    named = [value.removeprefix(RECIPES) for value in point if value.startswith(RECIPES)]
    return (named or [recipe])[0], tuple(value for value in point if not value.startswith(RECIPES))


def _run_jobs(submission: Submission, cluster: Cluster, point: tuple[str, ...], i: int, count: int) -> list[Job]:
    suffix = f"-{i}" if count > 1 else ""
    run_dir = submission.run_dir or f"{cluster.run_root}/{submission.title}{suffix}"
    recipe, overrides = recipe_of(point, submission.recipe)
    if count > 1 and not any(word.startswith("track.group=") for word in submission.overrides):
        overrides = (*overrides, f"track.group={submission.title}")  # wandb shows a sweep as one
    ranks, nodes = str(cluster.ranks_per_node or 1), cluster.nodes or 1
    name = title_of(recipe)
    run = run_dir.rstrip("/").rsplit("/", 1)[-1]
    files: tuple[tuple[str, str], ...] = ()
    if (own := Path(recipe)).suffix in (".py", ".yaml") and own.is_file():
        files, recipe = ((own.name, own.read_text(encoding="utf-8")),), f"{BROUGHT}{own.name}"
    train = Job(
        name=f"train{suffix}",
        command=(
            *("-m", "prune_opd.ranks.node", "--ranks", ranks, "--run-dir", run_dir),
            *(("--numa-binding", cluster.numa_binding) if cluster.numa_binding else ()),
            *(recipe, *submission.overrides, *overrides),
        ),
        nodes=nodes,
        label=name if run in (name, f"{name}{suffix}") else f"{name}.{re.sub(r'[^A-Za-z0-9_-]+', '-', run)}",
        files=files,
    )
    jobs = [train]
    then = Job(name="", command=(), nodes=1, after=train.name, label=train.label)
    if submission.export:
        command = ("-m", "prune_opd.ranks.node", "--export-to", submission.export, "--run-dir", run_dir, recipe)
        jobs.append(replace(then, name=f"export{suffix}", command=command, files=files))
    if submission.evaluate:
        # fmt: off
        command = (
            "-m", "prune_opd.cli", "eval", f"{run_dir}/hf", "--task", submission.evaluate,
            "-k", str(submission.samples), "--problems", str(submission.problems),
            "--nproc", ranks,
        )
        # fmt: on
        jobs.append(replace(then, name=f"evaluate{suffix}", command=command))
    return jobs
