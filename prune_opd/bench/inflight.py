"""`prune-opd bench inflight`: what stopping drifting responses in flight saves and costs, off against on.

Each pair is trained as its recipe says for a few steps, without and with the in-flight gate, with the same seeds, in
turns. Both sides see the same prompts in the same order, and in the first step the same student; afterwards they are
two trainings. Times are those of metrics.jsonl, with the CPU seconds of rank 0, which a busy machine disturbs less.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, median, stdev
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from prune_opd.bench.compare_loss import Target, environment
from prune_opd.config import TrainConfig
from prune_opd.errors import ConfigError, UserError
from prune_opd.recipe import load_recipe
from prune_opd.track.metrics import read_metrics, task_names

SIDES = {"off": "off", "on": "gate"}
CHECKS_PER_RESPONSE = 4  # the first checkpoint lies at this part of the longest response
TIMEOUT = 1800  # seconds a training may take
CUT, OVERHEAD = 0.6, 0.05  # to reach: tokens beyond the reliable length, and step time of a pair that does not drift


@dataclass(frozen=True)
class Settings:
    steps: int = 40
    seeds: tuple[int, ...] = (0, 1, 2)
    problems: int = 256
    warmup: int = 1  # steps that the times leave out


QUICK = Settings(steps=3, seeds=(0,), problems=0)


def run(
    path: Path,
    quick: bool,
    pairs: Annotated[list[str] | None, typer.Argument(metavar="[PAIR …]", help="Recipes to train.")] = None,
    steps: Annotated[int | None, typer.Option(min=2, help="Steps of a training.")] = None,
    seeds: Annotated[int | None, typer.Option(min=1, help="Trainings of each side.")] = None,
) -> int:
    """Measure, write the JSON file, print the tables. Returns 0 whether or not the targets are reached."""
    settings = QUICK if quick else Settings()
    chosen = Settings(
        steps=steps or settings.steps,
        seeds=tuple(range(seeds)) if seeds else settings.seeds,
        problems=settings.problems,
    )
    names = pairs or ["tiny_compatible"]
    for name in names:
        _recipe(name)
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


def _recipe(name: str) -> TrainConfig:
    config = load_recipe(name)
    if not isinstance(config, TrainConfig) or config.gate is None:
        raise ConfigError(f"PAIR = {name!r} has no gate: name a recipe of a distillation with one")
    return config


# ---------------------------------------------------------------------------------------------------- measuring


def _measure(name: str, settings: Settings, console: Console) -> list[dict[str, Any]]:
    """One record a training: side, seed, its steps and its evaluations."""
    runs = []
    config = _recipe(name)
    first_check = max(config.horizon.max_len // CHECKS_PER_RESPONSE, 1)
    with tempfile.TemporaryDirectory(prefix="prune-opd-") as folder:
        for turn, seed in enumerate(settings.seeds):
            order = list(SIDES) if turn % 2 == 0 else list(SIDES)[::-1]
            for side in order:
                console.print(f"{name}, seed {seed}, in-flight gate {side}")
                run_dir = Path(folder) / f"{name}-{seed}-{side}"
                overrides = {
                    "seed": seed,
                    "steps": settings.steps,
                    "rollout.inflight.mode": SIDES[side],
                    "rollout.inflight.first_check": first_check,
                    "evaluation.every": 0,
                    "evaluation.problems": settings.problems,
                    "checkpoint.every": 0,
                    "checkpoint.export_hf": "false",
                    "track.wandb": "disabled",
                }
                _train(name, run_dir, overrides)
                steps, evaluations = read_metrics(run_dir / "metrics.jsonl")
                runs.append({"side": side, "seed": seed, "steps": steps, "evaluations": evaluations})
    return runs


def _train(name: str, run_dir: Path, overrides: dict[str, Any]) -> None:
    settings = [f"{key}={value}" for key, value in overrides.items()]
    command = [sys.executable, "-m", "prune_opd.cli", "train", name, *settings, "--run-dir", str(run_dir)]
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
    """Both sides' medians a step, their ratios, and the targets that they reach or miss."""
    sides = {side: _side([run for run in runs if run["side"] == side], settings) for side in SIDES}
    off, on = sides["off"], sides["on"]
    ratios = {key: on[key] / off[key] for key in ("tokens", "time_step", "cpu_step") if off.get(key) and on.get(key)}
    wasted = 1 - on["tokens_beyond"] / off["tokens_beyond"] if off["tokens_beyond"] else 0.0
    targets = [
        Target("share of the tokens beyond the reliable length that is cut", wasted, CUT, at_least=True),
        Target("step time (wall) on / off", ratios["time_step"], 1 + OVERHEAD),
    ]
    if "cpu_step" in ratios:
        targets.append(Target("step time (CPU seconds) on / off", ratios["cpu_step"], 1 + OVERHEAD))
    if off["accuracy"] is not None and on["accuracy"] is not None:
        error = math.hypot(off["accuracy_stderr"], on["accuracy_stderr"])
        targets.append(
            Target("final accuracy lost, against its standard error", off["accuracy"] - on["accuracy"], error)
        )
    return {
        "sides": sides,
        "ratios": ratios,
        "tokens_beyond_cut": wasted,
        "targets": [{**asdict(target), "reached": target.reached} for target in targets],
    }


def _side(runs: list[dict[str, Any]], settings: Settings) -> dict[str, Any]:
    steps = [step for run in runs for step in run["steps"]]
    timed = [step for step in steps if step["step"] > settings.warmup]
    responses = [step["tokens_generated"] / step["response_length"] for step in steps]
    beyond = [
        (step["response_length"] - step["reliable_length"]) * count
        for step, count in zip(steps, responses, strict=True)
    ]
    last = [run["evaluations"][-1] for run in runs if run["evaluations"]]
    accuracies = [line[f"eval_{task}"] for line in last for task in task_names(line)[:1]]
    errors = [line[f"eval_{task}_stderr"] for line in last for task in task_names(line)[:1]]
    spread = stdev(accuracies) / math.sqrt(len(accuracies)) if len(accuracies) > 1 else None
    times = {
        key: median(step[key] for step in timed if key in step)
        for key in (
            "time_rollout",
            "time_inflight",
            "time_teacher",
            "time_train",
            "time_step",
            "cpu_rollout",
            "cpu_step",
        )
        if any(key in step for step in timed)
    }
    return {
        "tokens": mean(step["tokens_generated"] for step in steps),
        "tokens_beyond": mean(beyond),
        "stopped": mean(step["pruned_inflight"] for step in steps),
        "too_early": sum(step.get("inflight_too_early", 0) for step in steps),
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
