"""`prune-opd bench start`: CPU seconds and memory of a start until the first step, of this checkout and of another.

Each launch is a real `prune-opd train tiny_compatible`. When rank 0 says that it is ready for the first step, the CPU
seconds and the memory of the command and of all below it are read, and the launch is ended. Memory twice: resident
(RSS), where shared pages count in every process that has them, and in shares (PSS), which add up to what the machine
has less.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import psutil
import typer

from benchmarks.common import BENCH, MIB, Out, Quick, Report, load, rotated, table
from prune_opd.errors import UserError

HERE = Path(__file__).resolve().parents[2]
SETTINGS = ("parallel.tensor=1", "evaluation.problems=0", "track.wandb=disabled", "track.report=false")


@dataclass(frozen=True)
class Settings:
    ranks: tuple[int, ...]
    turns: int


def run(
    out: Out = BENCH,
    quick: Quick = False,
    turns: Annotated[int, typer.Option(min=1, help="Launches of each, in turns; medians.")] = 3,
    other: Annotated[Path | None, typer.Option(help="Another checkout, to compare with: an earlier version.")] = None,
) -> int:
    """See the module."""
    settings = Settings((1,), 1) if quick else Settings((1, 2, 4), turns)
    report = Report(out / "start.json", quick, settings)
    checkouts = {"this": HERE} | ({"other": other.resolve()} if other else {})
    rows: list[dict[str, Any]] = []
    for ranks in settings.ranks:
        found: dict[str, list[dict[str, float]]] = {name: [] for name in checkouts}
        for turn in range(settings.turns):
            for name in rotated(list(checkouts), turn):
                found[name].append(launch(ranks, checkouts[name]))
        medians = {name: {key: median(one[key] for one in of) for key in of[0]} for name, of in found.items()}
        rows += [{"start": name, "ranks": ranks, **values} for name, values in medians.items()]
        if other:
            ratios = {key: value / medians["other"][key] for key, value in medians["this"].items()}
            rows.append({"start": "this / other", "ranks": ranks, **ratios})
    result = report.write(launches=rows)
    report.console.print(load(result["environment"]))
    columns = {
        "start": "{start}",
        "ranks": "{ranks}",
        "CPU s": "{cpu:.2f}",
        "PSS [MiB]": "{pss:.2f}",
        "RSS [MiB]": "{rss:.2f}",
    }
    report.console.print(table("a start of tiny_compatible, until its first step", columns, rows))
    report.name_files()
    return 0


def launch(ranks: int, checkout: Path) -> dict[str, float]:
    """CPU seconds, PSS and RSS [MiB] of one launch when it is ready for its first step. Raises UserError."""
    with tempfile.TemporaryDirectory(prefix="prune-opd-") as folder:
        command = [sys.executable, "-m", "prune_opd.cli", "train", "tiny_compatible", *SETTINGS]
        command += ["--nproc", str(ranks), "--run-dir", f"{folder}/run"]
        training = subprocess.Popen(
            command,
            cwd=checkout,
            env=os.environ | {"PYTHONPATH": str(checkout)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        said: list[str] = []
        try:
            for line in training.stdout or ():
                said.append(line)
                if line.rstrip().endswith(" s  ready"):
                    return _read(psutil.Process(training.pid))
            raise UserError(f"a launch of {ranks} ranks ended before its first step: {''.join(said)[-2000:]}")
        finally:
            for process in psutil.Process(training.pid).children(recursive=True):
                with suppress(psutil.NoSuchProcess):
                    process.kill()  # at once: torchrun's agent would let its ranks save
            training.kill()
            training.communicate()  # until the last rank is gone


def _read(command: psutil.Process) -> dict[str, float]:
    found = {"cpu": 0.0, "pss": 0.0, "rss": 0.0}
    for process in (command, *command.children(recursive=True)):
        with suppress(psutil.NoSuchProcess):  # a compiler's or git's, which has ended meanwhile
            times, memory = process.cpu_times(), process.memory_full_info()
            found["cpu"] += sum(times[:4])  # with those of ended children
            found["pss"] += memory.pss / MIB
            found["rss"] += memory.rss / MIB
    return found
