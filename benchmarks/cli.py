"""`prune-opd bench NAME [ARG …] [--out DIR] [--quick]`: the measurements behind the project's claims.

A benchmark is a function `run(path, quick)` that writes its JSON file to `path`, prints a table and returns an exit
code; `quick` asks for a small size that only shows that it works. Further parameters are its own arguments and options,
in typer's notation:

    def run(path: Path, quick: bool, pairs: Annotated[list[str] | None, typer.Argument()] = None, seeds: int = 3) -> int
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from benchmarks.loss import command as loss
from benchmarks.peers import command as peers
from benchmarks.reshard import command as reshard
from benchmarks.strategies import command as strategies
from benchmarks.studies.fp8_noise import command as fp8_noise
from benchmarks.studies.pair_check import command as pair_check
from benchmarks.studies.scaling import command as scaling
from prune_opd.errors import ConfigError

BENCHMARKS: dict[str, Callable[..., int]] = {
    "loss": loss.run,
    "reshard": reshard.run,
    "fp8-noise": fp8_noise.run,
    "peers": peers.run,
    "strategies": strategies.run,
    "scaling": scaling.run,
    "pair-check": pair_check.run,
}

Out = Annotated[Path, typer.Option(metavar="DIR", help="Where NAME.json goes.")]
Quick = Annotated[bool, typer.Option("--quick", help="A small size that only shows that it works.")]


def run_benchmark(arguments: list[str]) -> int:
    """Run the benchmark that a command line names and return its exit code. ConfigError for one that does not exist."""
    what = "Run a benchmark: prints a table and writes every measurement to DIR/NAME.json."
    app = typer.Typer(cls=_Benchmarks, help=what, add_completion=False)
    for name, run in BENCHMARKS.items():
        title = (inspect.getdoc(inspect.getmodule(run)) or "").partition("\n")[0]
        app.command(name, help=title.rpartition("`: ")[2])(_command(name, run))
    return int(app(arguments, prog_name="prune-opd bench", standalone_mode=False) or 0)


class _Benchmarks(TyperGroup):
    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in self.commands:
            near = difflib.get_close_matches(cmd_name, self.commands, n=1, cutoff=0.0)
            raise ConfigError(f"there is no benchmark {cmd_name!r}: did you mean {near[0]!r}?")
        return super().get_command(ctx, cmd_name)


def _command(name: str, run: Callable[..., int]) -> Callable[..., int]:
    """A benchmark as a command: its own parameters, --out and --quick."""

    def command(out: Path, quick: bool, **own: Any) -> int:
        return run(out / f"{name}.json", quick, **own)

    # typer reads the command line's arguments and options off this signature
    own = list(inspect.signature(run, eval_str=True).parameters.values())[2:]
    keyword = inspect.Parameter.KEYWORD_ONLY
    shared = [
        inspect.Parameter("out", keyword, default=Path("bench"), annotation=Out),
        inspect.Parameter("quick", keyword, default=False, annotation=Quick),
    ]
    command.__signature__ = inspect.Signature([p.replace(kind=keyword) for p in own] + shared)  # type: ignore[attr-defined]
    return command
