"""`prune-opd bench NAME [ARG …] [--out DIR] [--quick]`: the measurements behind the project's claims.

A benchmark is a typer command: its module's function `run` with `out: Out` and `quick: Quick` (common.py) among its
parameters. It writes OUT/NAME.json, prints a table and returns an exit code.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable
from typing import Any

import typer
from typer.core import TyperGroup

from benchmarks.loss import command as loss
from benchmarks.peers import command as peers
from benchmarks.reshard import command as reshard
from benchmarks.start import command as start
from benchmarks.strategies import command as strategies
from benchmarks.strategies import keep
from benchmarks.studies.fp8_noise import command as fp8_noise
from benchmarks.studies.judge import command as judge
from benchmarks.studies.objectives import command as objectives
from benchmarks.studies.pair import command as pair
from benchmarks.studies.pair_check import command as pair_check
from benchmarks.studies.scaling import command as scaling
from prune_opd.errors import ConfigError

BENCHMARKS: dict[str, Callable[..., int]] = {
    "loss": loss.run,
    "reshard": reshard.run,
    "start": start.run,
    "fp8-noise": fp8_noise.run,
    "peers": peers.run,
    "strategies": strategies.run,
    "keep": keep.run,
    "scaling": scaling.run,
    "pair": pair.run,
    "pair-check": pair_check.run,
    "judge": judge.run,
    "objectives": objectives.run,
}


def run_benchmark(arguments: list[str]) -> int:
    """Run the benchmark that a command line names and return its exit code. ConfigError for one that does not exist."""
    what = "Run a benchmark: prints a table and writes every measurement to DIR/NAME.json."
    app = typer.Typer(cls=_Benchmarks, help=what, add_completion=False)
    for name, run in BENCHMARKS.items():
        title = (inspect.getdoc(inspect.getmodule(run)) or "").partition("\n")[0]
        app.command(name, help=title.rpartition("`: ")[2])(run)
    return int(app(arguments, prog_name="prune-opd bench", standalone_mode=False) or 0)


class _Benchmarks(TyperGroup):
    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in self.commands:
            near = difflib.get_close_matches(cmd_name, self.commands, n=1, cutoff=0.0)
            raise ConfigError(f"there is no benchmark {cmd_name!r}: did you mean {near[0]!r}?")
        return super().get_command(ctx, cmd_name)
