"""`prune-opd bench reshard`: the weight stream against the bare collectives, vLLM's reload, and the two together.

A launch is one student layout and one engine, because a process can have only one engine (measure.py says what
is measured and how). Within a launch the contenders take turns, round after round, so that what else the machine does
falls on all of them; a ratio is that of two medians. No torch on this side.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from rich.console import Console
from rich.progress import track

from benchmarks.common import BENCH, MIB, Out, Quick, Report, Target, load, measure, print_targets, table

RANKS = 2
TRANSPORTS = ("collective", "shared")
TIMEOUT = 900  # seconds a launch may take
COLUMNS = {
    "": "{name}",
    "time s": "{wall:.3f}",
    "CPU s of all ranks": "{cpu:.3f}",
    "÷ bare": "{bare:.2f}",
    "÷ reload": "{reload:.2f}",
}
TARGETS = {  # of each transport: limit, and whether it is the least
    "speed of the stream / bare broadcasts": (0.8, True),
    "stream with reload / larger of the two": (1.2, False),
    "memory of the stream in buckets": (2, False),
    "memory of stream with reload beyond the reload's in buckets": (2, False),
}


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


def run(out: Out = BENCH, quick: Quick = False) -> int:
    """Measure, write the JSON file, print the tables. Returns 0 whether or not the targets are reached."""
    settings = QUICK if quick else Settings()
    report = Report(out / "reshard.json", quick, settings)
    raw: list[dict[str, Any]] = []
    shape = (settings.layers, settings.hidden, settings.vocab)
    with tempfile.TemporaryDirectory(prefix="prune-opd-") as folder:
        for student, rollout_tp in track(settings.launches, "measuring", console=report.console, transient=True):
            request = {"folder": folder, "layout": student, "rollout_tp": rollout_tp}
            request |= {"shape": shape, "bucket_mb": settings.bucket_mb, "rounds": settings.rounds}
            what = f"student {student} with rollout TP {rollout_tp}"
            ranks = measure("benchmarks.reshard.measure", request, what, ranks=RANKS, timeout=TIMEOUT)
            raw.append({"student": student, "rollout_tp": rollout_tp, "ranks": ranks})
    result = report.write(
        environment=report.environment(torch=raw[0]["ranks"][0]["torch"]),
        launches=[_compare(launch, settings, quick) for launch in raw],
        raw=raw,
    )
    _print(result, report.console)
    report.name_files()
    return 0


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
    if "all-gather" in wall:
        ratios["bare broadcasts' speed / bare all-gathers'"] = wall["all-gather"] / wall["bare"]
    limits = {} if quick else {f"{name}: {text}": TARGETS[text] for name in TRANSPORTS for text in TARGETS}
    return {
        "student": launch["student"],
        "rollout_tp": launch["rollout_tp"],
        **{name: ranks[0][name] for name in ("parameters", "model_bytes", "moved_bytes")},
        "wall_s": wall,
        "cpu_s": cpu,
        "memory": {name: [rank["memory"][name] for rank in ranks] for name in TRANSPORTS},
        "ratios": ratios,
        "targets": [Target(name, ratios[name], *limit).record() for name, limit in limits.items()],
    }


# ---------------------------------------------------------------------------------------------------- printing


def _print(result: dict[str, Any], console: Console) -> None:
    settings, environment = result["settings"], result["environment"]
    first = result["launches"][0]
    console.print(
        f"{first['parameters'] / 1e6:.0f} M parameters, {first['model_bytes'] / MIB:.0f} MiB in fp32, buckets of "
        f"{settings['bucket_mb']:g} MiB; {RANKS} ranks of one thread, torch {environment['torch']}; medians of "
        f"{settings['rounds']} rounds; {load(environment)}"
    )
    for launch in result["launches"]:
        wall, cpu = launch["wall_s"], launch["cpu_s"]
        rows = [
            {"name": name, "wall": s, "cpu": cpu[name], "bare": s / wall["bare"], "reload": s / wall["reload"]}
            for name, s in wall.items()
        ]
        title = f"student {launch['student'].upper()} → rollout TP{launch['rollout_tp']}"
        console.print(table(title, COLUMNS, rows))
        print_targets(launch["targets"], console)
        for name, ratio in launch["ratios"].items():
            console.print(f"        {name}: {ratio:.3f}")
