"""Running the plan of the comparison: one process a run, one core a process, several side by side, resumable.

A process is rank.py, one rank without torchrun. A folder that holds the same run, finished, is left as it is, so a
benchmark that was cut off goes on where it was.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.common import last_words
from benchmarks.strategies.judged import judged_evaluations
from benchmarks.strategies.plan import RunSpec
from benchmarks.strategies.rank import Wanted
from prune_opd.errors import UserError
from prune_opd.process import rank_environment
from prune_opd.track.metrics import FILE_NAME, Record, read_metrics

POLL_SECONDS = 0.2
Start = Callable[[RunSpec, Wanted, Path, int], "subprocess.Popen[Any]"]
Result = tuple[RunSpec, list[Record], list[Record]]


def finished(wanted: Wanted, folder: Path) -> tuple[list[Record], list[Record]] | None:
    """Step records and evaluations of the run in the folder; None if it is another one or not finished."""
    try:
        if Wanted.read(folder) != wanted:
            return None
        steps, evaluations = read_metrics(folder / FILE_NAME)
        if not wanted.config.evaluation.problems:
            evaluations = judged_evaluations(wanted.config, folder)
    except (UserError, OSError, ValueError):  # none yet, or another version's
        return None
    complete = len(steps) == wanted.config.steps and evaluations and evaluations[-1]["step"] == wanted.config.steps
    return (steps, evaluations) if complete else None


def resolved(spec: RunSpec, specs: Sequence[RunSpec], folder: Path) -> Wanted | None:
    """What the run's process is given; None while a control waits for the run whose windows it replays."""
    if not spec.method.replays:
        return Wanted(spec.config, spec.problems_between)
    (source,) = [other for other in specs if other.key == f"{spec.pair}/{spec.method.against}/{spec.seed}"]
    records = finished(Wanted(source.config, source.problems_between), folder / source.key)
    if records is None:
        return None
    windows = tuple(int(record["horizon"]) for record in records[0])
    return Wanted(spec.config, spec.problems_between, windows, spec.method.scatter)


def run_all(
    specs: Sequence[RunSpec], folder: Path, jobs: int, console: Console, start: Start | None = None
) -> list[Result]:
    """Run what is not finished, at most `jobs` at a time, in the plan's order. Returns every run's records.

    Raises:
        UserError: a run failed; those beside it are ended, and what is finished stays for the next time.
    """
    start = start or start_run
    pending = list(specs)
    running: dict[int, tuple[RunSpec, subprocess.Popen[Any], float]] = {}  # by core, with the time of its start
    free = sorted(os.sched_getaffinity(0))[:jobs]
    done = 0
    try:
        while pending or running:
            for spec in list(pending):
                wanted = resolved(spec, specs, folder)
                if wanted is not None and finished(wanted, folder / spec.key):
                    pending.remove(spec)
                    done += 1
                elif wanted is not None and free:
                    pending.remove(spec)
                    core = free.pop(0)
                    running[core] = spec, start(spec, wanted, folder / spec.key, core), time.monotonic()
                if not free:
                    break
            for core, (spec, process, started) in list(running.items()):
                if process.poll() is not None:
                    del running[core]
                    free.append(core)
                    _check(spec, process.returncode, specs, folder)
                    done += 1
                    seconds = time.monotonic() - started
                    console.print(f"{done}/{len(specs)}  {spec.key}  {seconds:.0f} s", highlight=False)
            time.sleep(POLL_SECONDS if running else 0)
    finally:
        for _, process, _ in running.values():
            process.kill()
            process.wait()
    return [(spec, *records) for spec in specs if (records := records_of(spec, specs, folder))]


def records_of(spec: RunSpec, specs: Sequence[RunSpec], folder: Path) -> tuple[list[Record], list[Record]] | None:
    """Step records and evaluations of a run that is finished."""
    wanted = resolved(spec, specs, folder)
    return finished(wanted, folder / spec.key) if wanted else None


def _check(spec: RunSpec, code: int, specs: Sequence[RunSpec], folder: Path) -> None:
    if code == 0 and records_of(spec, specs, folder):
        return
    log = folder / spec.key / "log.txt"
    said = last_words(log.read_text(errors="replace") if log.exists() else "")
    raise UserError(f"run {spec.key} failed with exit code {code} ({log}): {said}")


def start_run(spec: RunSpec, wanted: Wanted, where: Path, core: int) -> subprocess.Popen[Any]:
    """The run as a process of its own on one core; what it prints goes to log.txt."""
    shutil.rmtree(where, ignore_errors=True)  # of a run that was cut off, or of other settings
    where.mkdir(parents=True)
    wanted.write(where)
    rank = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}  # alone: no port that another run could take meanwhile
    env = rank_environment({**os.environ, "OMP_NUM_THREADS": "1"}) | rank | meeting
    command = [sys.executable, "-m", "benchmarks.strategies.rank", str(where)]
    with (where / "log.txt").open("wb") as log:
        return subprocess.Popen(
            command, env=env, stdout=log, stderr=subprocess.STDOUT, preexec_fn=lambda: os.sched_setaffinity(0, {core})
        )
