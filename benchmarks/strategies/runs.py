"""Running the plan of the comparison: one process a run, one core a process, several side by side, resumable.

A run goes through the worker of `prune-opd train`; with one rank it needs no torchrun. A folder that holds a finished
run of the same config is left as it is, so a benchmark that was cut off goes on where it was.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.strategies.plan import RunSpec
from prune_opd.config import TrainConfig
from prune_opd.config.yaml import config_differences, load_config, save_config
from prune_opd.errors import ConfigError, UserError
from prune_opd.process import rank_environment
from prune_opd.track.metrics import FILE_NAME, Record, read_metrics

POLL_SECONDS = 0.2
Start = Callable[[RunSpec, TrainConfig, Path, int], "subprocess.Popen[Any]"]


@dataclass
class _Running:
    spec: RunSpec
    process: subprocess.Popen[Any]
    core: int
    started: float


def finished(config: TrainConfig, folder: Path) -> tuple[list[Record], list[Record]] | None:
    """Step records and evaluations of a finished run of exactly this config, None if there is none in the folder."""
    try:
        if config_differences(load_config(folder / "config.yaml"), config):
            return None
        steps, evaluations = read_metrics(folder / FILE_NAME)
    except (ConfigError, UserError):  # none yet, or another version's
        return None
    complete = len(steps) == config.steps and evaluations and evaluations[-1]["step"] == config.steps
    return (steps, evaluations) if complete else None


def resolved(spec: RunSpec, specs: Sequence[RunSpec], folder: Path) -> TrainConfig | None:
    """The run's complete config; None while a control waits for the run whose windows it replays."""
    if spec.method.windows_of is None:
        return spec.config
    (source,) = [
        other
        for other in specs
        if (other.pair, other.method.name, other.seed) == (spec.pair, spec.method.windows_of, spec.seed)
    ]
    records = finished(source.config, folder / source.key)
    if records is None:
        return None
    windows = tuple(int(record["horizon"]) for record in records[0])
    return replace(spec.config, horizon=replace(spec.config.horizon, windows=windows))


def run_all(
    specs: Sequence[RunSpec], folder: Path, jobs: int, console: Console, start: Start | None = None
) -> list[tuple[RunSpec, list[Record], list[Record]]]:
    """Run what is not finished, at most `jobs` at a time, in the plan's order. Returns every run's records.

    Raises:
        UserError: a run failed; those beside it are ended, and what is finished stays for the next time.
    """
    start = start or start_run
    pending, running = list(specs), list[_Running]()
    free = sorted(os.sched_getaffinity(0))[:jobs]
    done = 0
    try:
        while pending or running:
            for spec in list(pending):
                config = resolved(spec, specs, folder)
                if config is not None and finished(config, folder / spec.key):
                    pending.remove(spec)
                    done += 1
                elif config is not None and free:
                    pending.remove(spec)
                    core = free.pop(0)
                    running.append(_Running(spec, start(spec, config, folder / spec.key, core), core, time.monotonic()))
                if not free:
                    break
            for run in [run for run in running if run.process.poll() is not None]:
                running.remove(run)
                free.append(run.core)
                _check(run, specs, folder)
                done += 1
                seconds = time.monotonic() - run.started
                console.print(f"{done}/{len(specs)}  {run.spec.key}  {seconds:.0f} s", highlight=False)
            time.sleep(POLL_SECONDS if running else 0)
    finally:
        for run in running:
            run.process.kill()
            run.process.wait()
    return collect(specs, folder)


def collect(specs: Sequence[RunSpec], folder: Path) -> list[tuple[RunSpec, list[Record], list[Record]]]:
    """The records of the runs that are finished, in the plan's order."""
    results = []
    for spec in specs:
        config = resolved(spec, specs, folder)
        records = finished(config, folder / spec.key) if config else None
        if records is not None:
            results.append((spec, *records))
    return results


def _check(run: _Running, specs: Sequence[RunSpec], folder: Path) -> None:
    where = folder / run.spec.key
    config = resolved(run.spec, specs, folder)
    if run.process.returncode == 0 and config is not None and finished(config, where):
        return
    log = where / "log.txt"
    lines = log.read_text(errors="replace").strip().splitlines() if log.exists() else []
    last = next((line for line in reversed(lines) if line.startswith("error:")), lines[-1] if lines else "no output")
    raise UserError(f"run {run.spec.key} failed with exit code {run.process.returncode} ({log}): {last}")


def start_run(spec: RunSpec, config: TrainConfig, where: Path, core: int) -> subprocess.Popen[Any]:
    """The run as a process of its own on one core; what it prints goes to log.txt."""
    shutil.rmtree(where, ignore_errors=True)  # of a run that was cut off, or of other settings
    where.mkdir(parents=True)
    save_config(config, where / "wanted.yaml")
    rank = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}  # alone: no port that another run could take meanwhile
    env = rank_environment({**os.environ, "OMP_NUM_THREADS": "1"}) | rank | meeting
    options = [str(where / "wanted.yaml"), "--run-dir", str(where), "--resume", "never"]
    command = [sys.executable, "-m", "prune_opd.cli.worker", "train", *options]
    with (where / "log.txt").open("wb") as log:
        return subprocess.Popen(
            command, env=env, stdout=log, stderr=subprocess.STDOUT, preexec_fn=lambda: os.sched_setaffinity(0, {core})
        )


def write_json(path: Path, result: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
