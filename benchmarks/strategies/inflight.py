"""`prune-opd bench inflight`: what stopping drifting responses in flight saves and costs, off against on.

Each pair is trained as its recipe says, without and with the in-flight gate, with the same seeds, in turns. Both sides
see the same prompts in the same order, and in the first step the same student; afterwards they are two trainings. Times
are those of metrics.jsonl, with the CPU seconds of rank 0, which a busy machine disturbs less.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from benchmarks.loss.command import Target, environment
from prune_opd.config import TrainConfig
from prune_opd.config.overrides import apply_overrides
from prune_opd.config.recipe import load_recipe
from prune_opd.errors import ConfigError, UserError
from prune_opd.track.metrics import read_metrics, task_names

PAIRS = ("tiny_compatible", "tiny_drift")
SIDES = {
    "off": ("rollout.inflight.mode=off",),
    "on": (
        "rollout.inflight.mode=gate",
        "rollout.inflight.schedule=fixed",
        "rollout.inflight.first_check={eighth}",
        "rollout.inflight.chunk={sixteenth}",
        "rollout.inflight.price=0.05",
    ),
}
TIMEOUT = 1800  # seconds a training may take
DRIFTING = 0.1  # share of the tokens that lie beyond the reliable length without the gate, from which on a pair drifts
CUT = 0.6  # to reach on such a pair: share of those tokens that is cut, with a shorter step
OVERHEAD = 0.05  # to reach on another: what the step may take longer


@dataclass(frozen=True)
class Settings:
    steps: int | None = None  # None: the recipe's
    seeds: tuple[int, ...] = (0, 1, 2)
    problems: int = 256
    overrides: tuple[str, ...] = ()  # of the recipe, on both sides
    warmup: int = 1  # steps that the times leave out


QUICK = Settings(steps=3, seeds=(0,), problems=0)


def run(
    path: Path,
    quick: bool,
    pairs: Annotated[list[str] | None, typer.Argument(metavar="[PAIR …]", help="Recipes to train.")] = None,
    steps: Annotated[int | None, typer.Option(min=2, help="Steps of a training.")] = None,
    seeds: Annotated[int | None, typer.Option(min=1, help="Trainings of each side.")] = None,
    set: Annotated[list[str] | None, typer.Option(metavar="KEY=VALUE", help="Of both sides.")] = None,
) -> int:
    """Measure, write the JSON file, print the tables. Returns 0 whether or not the targets are reached."""
    settings = QUICK if quick else Settings()
    chosen = Settings(
        steps=steps or settings.steps,
        seeds=tuple(range(seeds)) if seeds else settings.seeds,
        problems=settings.problems,
        overrides=tuple(set or ()),
    )
    names = pairs or (["tiny_compatible"] if quick else list(PAIRS))
    for name in names:
        _recipe(name, chosen.overrides)
    path.parent.mkdir(parents=True, exist_ok=True)
    before, console = environment(), Console()
    raw = {name: _measure(name, chosen, console) for name in names}
    result: dict[str, Any] = {
        "benchmark": "inflight",
        "quick": quick,
        "settings": asdict(chosen),
        "environment": before,
        "pairs": {name: compare(runs, chosen) for name, runs in raw.items()},
        "raw": raw,
    }
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    _print(result["pairs"], console)
    console.print(f"[bold]{path}[/]", soft_wrap=True)
    return 0


def _recipe(name: str, overrides: Sequence[str]) -> TrainConfig:
    config = apply_overrides(load_recipe(name), list(overrides))
    if not isinstance(config, TrainConfig) or config.gate is None:
        raise ConfigError(f"PAIR = {name!r} has no gate: name a recipe of a distillation with one")
    return config


# ---------------------------------------------------------------------------------------------------- measuring


def _measure(name: str, settings: Settings, console: Console) -> list[dict[str, Any]]:
    """One record a training: side, seed, its steps and its evaluations."""
    runs = []
    config = _recipe(name, settings.overrides)
    longest = config.horizon.max_len
    places = {"eighth": max(longest // 8, 1), "sixteenth": max(longest // 16, 1)}
    with tempfile.TemporaryDirectory(prefix="prune-opd-") as folder:
        for turn, seed in enumerate(settings.seeds):
            order = list(SIDES) if turn % 2 == 0 else list(SIDES)[::-1]
            for side in order:
                console.print(f"{name}, seed {seed}, in-flight gate {side}")
                run_dir = Path(folder) / f"{name}-{seed}-{side}"
                overrides = [
                    f"seed={seed}",
                    f"steps={settings.steps or config.steps}",
                    *settings.overrides,
                    *(setting.format(**places) for setting in SIDES[side]),
                    "evaluation.every=0",
                    f"evaluation.problems={settings.problems}",
                    "checkpoint.every=0",
                    "checkpoint.last=false",
                    "checkpoint.export_hf=false",
                    "track.wandb=disabled",
                    "track.report=false",
                ]
                _train(name, run_dir, overrides)
                steps, evaluations = read_metrics(run_dir / "metrics.jsonl")
                runs.append({"side": side, "seed": seed, "steps": steps, "evaluations": evaluations})
    return runs


def _train(name: str, run_dir: Path, overrides: Sequence[str]) -> None:
    command = [sys.executable, "-m", "prune_opd.cli", "train", name, *overrides, "--run-dir", str(run_dir)]
    try:
        process = subprocess.run(
            command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=TIMEOUT
        )
    except subprocess.TimeoutExpired:
        raise UserError(f"{name} was not trained after {TIMEOUT} s: set fewer --steps") from None
    if process.returncode != 0:
        raise UserError(f"{name} failed:\n{process.stdout[-1500:]}{process.stderr[-1500:]}")


# ---------------------------------------------------------------------------------------------------- comparing


def compare(runs: list[dict[str, Any]], settings: Settings) -> dict[str, Any]:
    """Both sides' means a step, their ratios, and the targets that they reach or miss."""
    sides = {side: _side([run for run in runs if run["side"] == side], settings) for side in SIDES}
    off, on = sides["off"], sides["on"]
    ratios = {key: on[key] / off[key] for key in ("tokens", "time_step", "cpu_step") if off.get(key) and on.get(key)}
    wasted = 1 - on["tokens_beyond"] / off["tokens_beyond"] if off["tokens_beyond"] else 0.0
    drifts = off["tokens_beyond"] > DRIFTING * off["tokens"]
    slowest = 1 if drifts else 1 + OVERHEAD
    targets = [Target("share of the tokens beyond the reliable length that is cut", wasted, CUT, True)] * drifts
    targets.append(Target("step time (wall) on / off", ratios["time_step"], slowest))
    if "cpu_step" in ratios:
        targets.append(Target("step time (CPU seconds) on / off", ratios["cpu_step"], slowest))
    if off["accuracy"] is not None and on["accuracy"] is not None:
        error = math.hypot(off["accuracy_stderr"], on["accuracy_stderr"])
        targets.append(
            Target("final accuracy lost, against its standard error", off["accuracy"] - on["accuracy"], error)
        )
    return {
        "sides": sides,
        "ratios": ratios,
        "drifts": drifts,
        "tokens_beyond_cut": wasted,
        "targets": [{**asdict(target), "reached": target.reached} for target in targets],
    }


def _side(runs: list[dict[str, Any]], settings: Settings) -> dict[str, Any]:
    steps = [step for run in runs for step in run["steps"]]
    timed = [step for step in steps if step["step"] > settings.warmup]
    responses = [step["tokens_trained"] / step["response_length"] for step in steps]
    beyond = [
        (step["response_length"] - step["reliable_length"]) * count
        for step, count in zip(steps, responses, strict=True)
    ]
    last = [run["evaluations"][-1] for run in runs if run["evaluations"]]
    accuracies = [line[f"eval_{task}"] for line in last for task in task_names(line)[:1]]
    errors = [line[f"eval_{task}_stderr"] for line in last for task in task_names(line)[:1]]
    spread = stdev(accuracies) / math.sqrt(len(accuracies)) if len(accuracies) > 1 else None
    times = {
        key: mean(step[key] for step in timed if key in step)
        for key in (
            "time_rollout",
            "time_inflight",
            "time_teacher",
            "time_train",
            "time_step",
            "cpu_rollout",
            "cpu_teacher",
            "cpu_train",
            "cpu_step",
        )
        if any(key in step for step in timed)
    }
    return {
        "tokens": mean(step["tokens_generated"] for step in steps),
        "tokens_beyond": mean(beyond),
        "stopped": mean(step["pruned_inflight"] for step in steps),
        "too_early": sum(step.get("inflight_too_early", 0) for step in steps),
        "checks": mean(step.get("inflight_checks", 0) for step in steps),
        "teacher_tokens_inflight": mean(step.get("teacher_tokens_inflight", 0) for step in steps),
        **times,
        "accuracy": mean(accuracies) if accuracies else None,
        "accuracy_stderr": spread if spread is not None else (errors[0] if errors else 0.0),
    }


def _print(pairs: dict[str, Any], console: Console) -> None:
    for name, pair in pairs.items():
        table = Table("a step", *SIDES, title=f"{name}: the in-flight gate off and on")
        for key in pair["sides"]["off"] | pair["sides"]["on"]:
            values = [pair["sides"][side].get(key) for side in SIDES]
            table.add_row(key, *("" if value is None else f"{value:.4g}" for value in values))
        console.print(table)
        for target in pair["targets"]:
            verdict = "[green]reached[/]" if target["reached"] else "[red]missed[/]"
            sign = "≥" if target["at_least"] else "≤"
            console.print(f"  {verdict}  {target['name']}: {target['value']:.3f} ({sign} {target['limit']:.3f})")
