"""`python -m launch`: what the make targets call. Exit codes: 0, the job's, or 2 for bad input."""

from __future__ import annotations

import atexit
import logging
import os
import shutil
import sys
import tempfile
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from launch.cluster import load_cluster, without_idle_secrets
from launch.jobs import Submission, plan_jobs, sweep_lines
from launch.wish import describe, settled, wishes
from prune_opd.errors import UserError

REPOSITORY = Path(__file__).resolve().parent.parent
HOME = "NEMORUN_HOME"  # where NeMo-Run keeps experiments; read when it is imported, so it is set first
THEIR_HOME = os.environ.get(HOME)  # what the user has set


def _exit(code: int) -> None:
    raise typer.Exit(code)


app = typer.Typer(
    help="Run recipes on a cluster.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    result_callback=_exit,
)

Name = Annotated[str, typer.Argument(metavar="NAME", help="The experiment: the recipe's name, or an id.")]


@app.command()
def submit(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE")] = None,
    cluster: Annotated[str, typer.Option(help="A file of launch/clusters, or the path of one.")] = "local",
    nodes: Annotated[int | None, typer.Option(min=1, help="Default: the cluster file's, else the recipe's.")] = None,
    ranks: Annotated[int | None, typer.Option(min=1, help="On each node; default likewise.")] = None,
    run_dir: Annotated[str | None, typer.Option(help="Default: the cluster's run_root and the recipe's name.")] = None,
    evaluate: Annotated[str | None, typer.Option(metavar="TASK", help="Evaluate the student afterwards.")] = None,
    samples: Annotated[int, typer.Option("-k", min=1, help="Samples per problem.")] = 16,
    problems: Annotated[int, typer.Option(min=1, help="Problems of the evaluation.")] = 256,
    export: Annotated[str | None, typer.Option(metavar="DIR", help="Export the last checkpoint afterwards.")] = None,
    sweep: Annotated[list[str] | None, typer.Option(help="dotted.key=a,b or recipe=a,b; several multiply.")] = None,
    detach: Annotated[bool, typer.Option("--detach", help="Do not wait for the end.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the scripts; change nothing.")] = False,
) -> int:
    """Train a recipe on a cluster and wait for the end; the exit code is the job's."""
    home = _prepare(tempfile.mkdtemp() if dry_run else None)
    if dry_run:
        atexit.register(shutil.rmtree, home, ignore_errors=True)
    cluster_file = load_cluster(cluster)
    submission = Submission(
        recipe, tuple(overrides or ()), run_dir, evaluate, samples, problems, export, tuple(sweep or ())
    )
    plan_jobs(submission, cluster_file)  # refuses what does not go together, before a recipe is loaded
    wanted = wishes(submission, cluster_file, nodes, ranks)
    online = any(wish.config.track.wandb == "online" for wish in wanted)
    cluster_file = without_idle_secrets(cluster_file, online)
    places = [settled(cluster_file, wish) for wish in wanted]
    early = max(place.signal_before_end or 0 for place in places)
    places = [replace(place, signal_before_end=early) for place in places]
    for wish, place in zip(wanted, places, strict=True):
        print(describe(wish, place), file=sys.stderr, flush=True)
    jobs = plan_jobs(submission, places)
    experiments = _experiment()
    if dry_run:
        with redirect_stdout(sys.stderr):  # NeMo-Run talks, and `make dryrun > job.sh` is a script
            script = experiments.as_script(submission.title, jobs, places[0])
        print(script.replace(home, _home()), end="")
        return 0
    from launch.executors import check_secrets

    check_secrets(cluster_file)
    experiment = experiments.submit(submission.title, jobs, places[0])
    print("\n".join([f"experiment {experiment._id}", *sweep_lines(submission)]), flush=True)
    if detach:
        return 0
    return int(experiments.first_failure(experiments.wait(experiment, lambda line: print(line, flush=True))))


@app.command()
def status(name: Name) -> int:
    """A line per job; exit code 0 only if none has failed."""
    _prepare()
    experiments = _experiment()
    found = experiments.states(experiments.find(name))
    print("\n".join(experiments.describe(state) for state in found))
    return int(experiments.first_failure(state for state in found if state.ended))


@app.command()
def logs(
    name: Name, job: Annotated[str | None, typer.Argument(metavar="JOB", help="Of the experiment.")] = None
) -> int:
    """What the ranks wrote, all attempts."""
    _prepare()
    experiments = _experiment()
    print(experiments.logs(experiments.find(name), job))
    return 0


@app.command()
def cancel(name: Name) -> int:
    """Cancel every job of an experiment that has not ended."""
    _prepare()
    experiments = _experiment()
    experiments.cancel(experiments.find(name))
    return 0


def _home() -> str:
    return THEIR_HOME or str(REPOSITORY / "runs" / "launch")


def _prepare(home: str | None = None) -> str:
    """Set NeMo-Run's home, before anything imports NeMo-Run, and return it."""
    os.environ[HOME] = home or _home()
    logging.getLogger().setLevel(logging.WARNING)
    return os.environ[HOME]


def _experiment() -> Any:
    """launch.experiment; `_prepare` comes before it."""
    import launch.experiment

    return launch.experiment


def main() -> None:
    try:
        app()
    except UserError as error:
        for line in str(error).splitlines():
            print(f"error: {line}", file=sys.stderr)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
