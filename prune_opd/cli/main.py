"""The `prune-opd` command. It loads, checks and starts ranks (`cli/start.py`); nothing heavy is imported on this side.

Bad input ends with one `error:` line per problem: exit code 2 for a recipe or an override, 1 for what `check/run.py`
refuses.
"""

from __future__ import annotations

import os
import re
import sys
from dataclasses import fields
from pathlib import Path
from typing import Annotated

import typer

from prune_opd import __version__
from prune_opd.cli import data, look, models, new, runs, worker
from prune_opd.config import TrainConfig
from prune_opd.errors import ConfigError, UserError


def _exit(code: int, version: bool) -> None:
    """A command returns its exit code."""
    raise typer.Exit(code)


app = typer.Typer(
    help="Prune-OPD: on-policy distillation that prunes unreliable rollouts.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
    result_callback=_exit,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"prune-opd {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and end.")
    ] = False,
) -> None:
    """Prune-OPD: on-policy distillation that prunes unreliable rollouts."""


app.command()(runs.train)
app.command()(runs.check)
app.command()(look.show)
app.command("settings")(look.settings_)
app.command()(new.new)
app.command()(runs.sft)
app.command("eval")(models.evaluate)
app.command()(models.export)
app.command()(models.convert)


@app.command()
def report(
    run_dirs: Annotated[list[Path], typer.Argument(metavar="RUN_DIR", help="Several runs give a comparison.")],
    out: Annotated[
        Path | None,
        typer.Option(help="The HTML file.", show_default="RUN_DIR/report.html, or comparison.html beside the first"),
    ] = None,
) -> int:
    """Draw the report of a run, or compare several: one HTML file and a PNG beside it."""
    from prune_opd.track.report import write_report

    if out is None:
        first = run_dirs[0].absolute()
        out = first / "report.html" if len(run_dirs) == 1 else first.parent / "comparison.html"
    for doubt in write_report(run_dirs, out):
        typer.echo(f"note: {doubt}", err=True)
    print(out)
    return 0


@app.command(
    add_help_option=False,
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    options_metavar="NAME [ARG …] [--out DIR] [--quick]",
)
def bench(context: typer.Context) -> int:
    """Run a benchmark: prints a table and writes every measurement to DIR/NAME.json (`prune-opd bench --help`)."""
    checkout = Path(__file__).resolve().parents[2]
    if not (checkout / "benchmarks").is_dir():
        raise UserError("the benchmarks are not part of an installed copy: run `prune-opd bench` from a checkout")
    sys.path.insert(0, str(checkout))
    os.environ["PYTHONPATH"] = os.pathsep.join([str(checkout), *filter(None, [os.environ.get("PYTHONPATH")])])
    from benchmarks.cli import run_benchmark

    return run_benchmark(context.args)


@app.command()
def plan(
    recipe: look.Recipe,
    overrides: look.Overrides = None,
    gpu: Annotated[str | None, typer.Option(help="a100, h100 or h200", show_default="planning.gpu")] = None,
    nodes: Annotated[int | None, typer.Option(min=1, help="Nodes.", show_default="planning.nodes")] = None,
    search: Annotated[bool, typer.Option("--search", help="Name the fastest layouts that fit.")] = False,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="Where plan.json and plan.png go.")] = None,
) -> int:
    """Memory by phase, step time and cost of a recipe on GPUs that nobody has taken yet; exit 1 if it does not fit."""
    from prune_opd.plan.command import run_plan

    return run_plan(runs.load(recipe, overrides, TrainConfig, "plan"), gpu, nodes, search, out)


@app.command()
def rehearse(
    recipe: runs.Recipe,
    overrides: runs.Overrides = None,
    nodes: Annotated[int | None, typer.Option(min=1, help="Nodes.", show_default="planning.nodes")] = None,
    rank: Annotated[
        list[int] | None, typer.Option(help="Give it again for more.", show_default="first, middle, last")
    ] = None,
    layers: Annotated[int | None, typer.Option(min=1, help="Of both models.", show_default="all")] = None,
    microbatches: Annotated[int, typer.Option(min=1, help="Of a rank, about.")] = 2,
) -> int:
    """One step at the recipe's real size, as single ranks, without a GPU: memory, collectives, what would stall it."""
    from prune_opd.rehearse.command import run_rehearse

    config = runs.load(recipe, overrides, TrainConfig, "rehearse")
    return run_rehearse(config, nodes, rank or [], layers, microbatches)


app.add_typer(data.app, name="data")


@app.command()
def recipes() -> int:
    """List the recipes of the repository with their models, GPUs and planned hours."""
    from prune_opd.plan.command import print_recipes

    print_recipes()
    return 0


TRAINS = ("train", "check")
INSTEAD = {  # options that other programs have: of which commands, and what does it here
    "--nodes": (TRAINS, "several nodes are a job on a cluster, make launch RECIPE=… NODES=… (docs/cluster.md)"),
    "--gpus": ((*TRAINS, "eval"), "--nproc N starts a rank for each of N GPUs"),
    "--recipe": ((*TRAINS, "plan", "show", "rehearse"), "the recipe stands first, without a name"),
    "--config": ((*TRAINS, "plan", "show", "rehearse"), "the recipe, or a run's config.yaml, stands first"),
    "--set": ((*TRAINS, "plan", "show", "rehearse"), "settings stand as they are, dotted.key=value"),
}


def refuse_dashes(words: list[str]) -> None:
    """Raise ConfigError for a setting that is written like an option: `--gate.k=4`."""
    plain = {field.name for field in fields(TrainConfig)} - {"name"}
    for word in words:
        found = re.match(r"--?([a-z_0-9]+(?:\.[a-z_0-9]+)*)(=.*)?$", word)
        if found and ("." in found[1] or (found[2] and found[1] in plain)):
            raise ConfigError(f"{word} is a setting, and settings have no dashes: write {found[1]}{found[2] or '=…'}")
    for word in words:
        name = word.partition("=")[0]
        if name in INSTEAD and words[0] in INSTEAD[name][0]:
            raise ConfigError(f"{words[0]} has no option {name}: {INSTEAD[name][1]}")


def main() -> None:
    worker.protect_files()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # models are directories: a missing file is an error, not a download
    try:
        refuse_dashes(sys.argv[1:])
        app()
    except UserError as error:
        worker.report(error)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
