"""`prune-opd bench reshard`: the weight stream against the bare collectives, vLLM's reload, and the two together.

A launch is one student layout and one engine, because a process can have only one engine (reshard_ranks.py says what
is measured and how). Within a launch the contenders take turns, round after round, so that what else the machine does
falls on all of them; a ratio is that of two medians. No torch on this side.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benchmarks.loss.command import MIB, Target, environment
from prune_opd.errors import UserError

RANKS = 2
TRANSPORTS = ("collective", "shared")
TIMEOUT = 900  # seconds a launch may take


@dataclass(frozen=True)
class Settings:
    """What is measured. The defaults are the benchmark: 200 M parameters. QUICK only shows that it works."""

    layers: int = 28
    hidden: int = 768
    vocab: int = 8192
    bucket_mb: float = 64
    rounds: int = 7
    launches: tuple[tuple[str, int], ...] = (("tp2", 1), ("tp2", 2), ("pp2", 1), ("pp2", 2))  # student, rollout TP


QUICK = Settings(layers=2, hidden=128, vocab=512, bucket_mb=0.5, rounds=1, launches=(("tp2", 1), ("pp2", 2)))


def run(path: Path, quick: bool) -> int:
    """Measure, write the JSON file, print the tables. Returns 0 whether or not the targets are reached."""
    path.parent.mkdir(parents=True, exist_ok=True)
    settings = QUICK if quick else Settings()
    console = Console()
    before = {**environment(), "load_average_before": os.getloadavg()}
    raw = _measure_all(settings, console)
    result = {
        "benchmark": "reshard",
        "quick": quick,
        "settings": asdict(settings),
        "environment": {**before, "load_average_after": os.getloadavg(), "torch": raw[0]["ranks"][0]["torch"]},
        "launches": [_compare(launch, settings, quick) for launch in raw],
        "raw": raw,
    }
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    _print(result, console)
    console.print(f"[bold]{path}[/]", soft_wrap=True)
    return 0


# ---------------------------------------------------------------------------------------------------- measuring


def _measure_all(settings: Settings, console: Console) -> list[dict[str, Any]]:
    raw = []
    with tempfile.TemporaryDirectory(prefix="prune-opd-") as folder, Progress(console=console, transient=True) as bar:
        task = bar.add_task("measuring", total=len(settings.launches))
        for student, rollout_tp in settings.launches:
            bar.update(task, description=f"student {student}, rollout TP {rollout_tp}")
            ranks = _measure(student, rollout_tp, settings, Path(folder))
            raw.append({"student": student, "rollout_tp": rollout_tp, "ranks": ranks})
            bar.advance(task)
    return raw


def _measure(student: str, rollout_tp: int, settings: Settings, folder: Path) -> list[dict[str, Any]]:
    """One launch: what each rank measured. UserError if it did not come to its end."""
    answer = folder / "answer.json"
    answer.unlink(missing_ok=True)
    options = {
        "folder": folder,
        "json": answer,
        "layout": student,
        "rollout-tp": rollout_tp,
        "layers": settings.layers,
        "hidden": settings.hidden,
        "vocab": settings.vocab,
        "bucket-mb": settings.bucket_mb,
        "rounds": settings.rounds,
    }
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(RANKS)]
    command += ["-m", "benchmarks.reshard.ranks"]
    command += [text for name, value in options.items() for text in (f"--{name}", str(value))]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    try:
        process = subprocess.run(command, env=env, capture_output=True, text=True, timeout=TIMEOUT)
    except subprocess.TimeoutExpired:
        raise UserError(f"student {student} with rollout TP {rollout_tp} was not done after {TIMEOUT} s") from None
    if process.returncode != 0 or not answer.exists():
        raise UserError(f"student {student} with rollout TP {rollout_tp} failed:\n{process.stderr[-3000:]}")
    return json.loads(answer.read_text())


# ---------------------------------------------------------------------------------------------------- comparing


def _compare(launch: dict[str, Any], settings: Settings, quick: bool) -> dict[str, Any]:
    """Medians and ratios of one launch. Times end with a barrier, so they are the slowest rank's; CPU time is a sum."""
    ranks: Sequence[dict[str, Any]] = launch["ranks"]
    names = list(ranks[0]["times"])
    wall = {name: median(turn["wall_s"] for turn in ranks[0]["times"][name]) for name in names}
    cpu = {
        name: median(sum(r["cpu_s"] for r in turns) for turns in zip(*(x["times"][name] for x in ranks), strict=True))
        for name in names
    }
    ratios: dict[str, float] = {}
    targets = []
    for name in TRANSPORTS:
        together = wall[f"{name} + reload"]
        alone, beyond = (
            max(median(rank["memory"][name][what]) for rank in ranks) / (settings.bucket_mb * MIB)
            for what in ("stream_bytes", "sync_beyond_reload_bytes")
        )
        ratios |= {
            f"{name}: speed of the stream / bare broadcasts": wall["bare"] / wall[name],
            f"{name}: stream with reload / larger of the two": together / max(wall[name], wall["reload"]),
            f"{name}: stream with reload / sum of the two": together / (wall[name] + wall["reload"]),
            f"{name}: checksums / stream with reload": median(ranks[0]["checksum_share"][name]),
            f"{name}: memory of the stream in buckets": alone,
            f"{name}: memory of stream with reload beyond the reload's in buckets": beyond,
        }
        if not quick:
            targets += [
                Target(f"{name}: {text}", ratios[f"{name}: {text}"], limit, at_least)
                for text, limit, at_least in (
                    ("speed of the stream / bare broadcasts", 0.8, True),
                    ("stream with reload / larger of the two", 1.2, False),
                    ("memory of the stream in buckets", 2, False),
                    ("memory of stream with reload beyond the reload's in buckets", 2, False),
                )
            ]
    if "all-gather" in wall:
        ratios["bare broadcasts' speed / bare all-gathers'"] = wall["all-gather"] / wall["bare"]
    return {
        "student": launch["student"],
        "rollout_tp": launch["rollout_tp"],
        "parameters": ranks[0]["parameters"],
        "model_bytes": ranks[0]["model_bytes"],
        "moved_bytes": ranks[0]["moved_bytes"],
        "wall_s": wall,
        "cpu_s": cpu,
        "memory": {name: [rank["memory"][name] for rank in ranks] for name in TRANSPORTS},
        "ratios": ratios,
        "targets": [{**asdict(target), "reached": target.reached, "text": str(target)} for target in targets],
    }


# ---------------------------------------------------------------------------------------------------- printing


def _print(result: dict[str, Any], console: Console) -> None:
    settings, environment = result["settings"], result["environment"]
    first = result["launches"][0]
    console.print(
        f"{first['parameters'] / 1e6:.0f} M parameters, {first['model_bytes'] / MIB:.0f} MiB in fp32, buckets of "
        f"{settings['bucket_mb']:g} MiB; {RANKS} ranks with one thread each on {environment['cpus']} CPUs, torch "
        f"{environment['torch']}; medians of {settings['rounds']} rounds; load average "
        f"{environment['load_average_before'][0]:.1f} → {environment['load_average_after'][0]:.1f}"
    )
    for launch in result["launches"]:
        title = f"student {launch['student'].upper()} → rollout TP{launch['rollout_tp']}"
        table = Table(title=title, title_justify="left")
        for column in ("", "time s", "CPU s of all ranks", "÷ bare", "÷ reload"):
            table.add_column(column, justify="right" if column else "left")
        wall = launch["wall_s"]
        for name, time in wall.items():
            table.add_row(
                name,
                f"{time:.3f}",
                f"{launch['cpu_s'][name]:.3f}",
                f"{time / wall['bare']:.2f}",
                f"{time / wall['reload']:.2f}",
            )
        console.print(table)
        for target in launch["targets"]:
            console.print(f"  {'[green]pass[/]' if target['reached'] else '[red]miss[/]'}  {target['text']}")
        for name, ratio in launch["ratios"].items():
            console.print(f"        {name}: {ratio:.3f}")
