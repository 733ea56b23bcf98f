"""`python -m launch`: what the make targets call. Exit codes: 0, the job's, or 2 for bad input."""

from __future__ import annotations

import dataclasses
import logging
import os
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer

from launch.cluster import load_cluster
from launch.jobs import Submission, plan_jobs, sweep_lines
from prune_opd.errors import UserError

REPOSITORY = Path(__file__).resolve().parent.parent
HOME = "NEMORUN_HOME"  # where NeMo-Run keeps experiments; read when it is imported, so it is set first


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
    nodes: Annotated[int | None, typer.Option(min=1, help="Instead of the cluster file's.")] = None,
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
    where = load_cluster(cluster)
    where = dataclasses.replace(where, nodes=nodes or where.nodes)
    for override in overrides or []:
        if "=" not in override:
            raise UserError(f"override {override!r} is not a setting: write it as dotted.key=value")
    submission = Submission(
        recipe, tuple(overrides or ()), run_dir, evaluate, samples, problems, export, tuple(sweep or ())
    )
    jobs = plan_jobs(submission, where)
    if dry_run:
        home = _home()
        with tempfile.TemporaryDirectory() as folder:
            for name, text in _experiment(folder).dry_run(submission.title, jobs, where).items():
                print(f"# ---- {name}\n{text.replace(folder, home)}")
        return 0
    experiments = _experiment()
    from launch.executors import check_secrets

    check_secrets(where)
    experiment = experiments.submit(submission.title, jobs, where)
    print("\n".join([f"experiment {experiment._id}", *sweep_lines(submission)]), flush=True)
    if detach:
        return 0
    return int(experiments.first_failure(experiments.wait(experiment, lambda line: print(line, flush=True))))


@app.command()
def status(name: Name) -> int:
    """A line per job; exit code 0 only if none has failed."""
    experiments = _experiment()
    found = experiments.states(experiments.find(name))
    print("\n".join(experiments.describe(state) for state in found))
    return int(experiments.first_failure(state for state in found if state.ended))


@app.command()
def logs(
    name: Name, job: Annotated[str | None, typer.Argument(metavar="JOB", help="Of the experiment.")] = None
) -> int:
    """What the ranks wrote, all attempts."""
    experiments = _experiment()
    print(experiments.logs(experiments.find(name), job))
    return 0


@app.command()
def cancel(name: Name) -> int:
    """Cancel every job of an experiment that has not ended."""
    experiments = _experiment()
    experiments.cancel(experiments.find(name))
    return 0


def _home() -> str:
    return os.environ.get(HOME) or str(REPOSITORY / "runs" / "launch")


def _experiment(home: str | None = None) -> Any:
    """launch.experiment, with NeMo-Run's home set before NeMo-Run is imported."""
    os.environ[HOME] = home or _home()
    logging.getLogger().setLevel(logging.WARNING)
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
