"""`prune-opd bench peers`: our training step against TRL's, on the same pair, prompts, lengths and number of updates.

The contenders start once and then take turns of a few steps, so that what else the machine does falls on all of them:

    ours_opd          the recipe with plain OPD at the full horizon: what TRL does, too
    ours_prune        the recipe's own strategy
    ours_eager        ours_opd with the engine that so short a run has by itself: it is not compiled
    trl               TRL's DistillationTrainer as two data-parallel ranks of one thread: its better layout here
    trl_one_process   the same as one process of two threads, for a few steps: what `python train.py` gives

Ours runs two data-parallel ranks of one thread as well, and vLLM compiles the model when it starts. TRL may, too: its
`torch_compile` makes no difference here. What a start costs is in no rate. Whatever a contender has trained is
evaluated by one process, on problems that no recipe was chosen on. No torch on this side.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from rich.console import Console

from benchmarks.common import (
    BENCH,
    BENCH_PACKAGES,
    Out,
    Quick,
    Report,
    Target,
    has_trl,
    load,
    measure,
    print_targets,
    rotated,
    table,
    with_trl,
)
from benchmarks.peers.turns import Contest
from prune_opd.check.run import check_train
from prune_opd.config import TrainConfig
from prune_opd.config.overrides import apply_overrides
from prune_opd.config.recipe import load_recipe
from prune_opd.config.yaml import save_config
from prune_opd.errors import UserError
from prune_opd.track.metrics import read_metrics

RECIPE = "tiny_compatible"
SAME_FOR_ALL = ("parallel.tensor=1", "evaluation.problems=0", "track.wandb=disabled", "checkpoint.every=0")
TARGET = 1.5  # our tokens per second over TRL's
OURS, TRL = "benchmarks.peers.ours", "benchmarks.peers.trl"
MEMORY = "memory_"  # of memory.py: bytes by owner after a step
PHASES = ("time_sync", "time_rollout", "time_teacher", "time_train")


@dataclass(frozen=True)
class Contender:
    name: str
    module: str
    ranks: int | None = 2  # None: one process without torchrun
    threads: int = 1
    overrides: tuple[str, ...] = ()
    steps: int | None = None  # None: all; fewer are timed only, not evaluated

    @property
    def env(self) -> dict[str, str]:
        """Of its processes. TRL may compile; what we compile, vLLM decides."""
        trl = with_trl() | {"TORCHDYNAMO_DISABLE": "0", "TORCH_CPP_LOG_LEVEL": "ERROR"}
        return {"HF_HUB_OFFLINE": "1"} | (trl if self.module == TRL else {})


FULL = ("horizon.strategy=full", "gate=null")
COMPILED = ("rollout.enforce_eager=false",)
CONTENDERS = (
    Contender("ours_opd", OURS, overrides=(*FULL, *COMPILED)),
    Contender("trl", TRL, overrides=FULL),
    Contender("ours_prune", OURS, overrides=COMPILED),
    Contender("ours_eager", OURS, overrides=FULL),
    Contender("trl_one_process", TRL, ranks=None, threads=2, overrides=FULL, steps=6),
)


@dataclass(frozen=True)
class Settings:
    """What is measured. The defaults are the benchmark; QUICK only shows that it works."""

    steps: int = 20
    save_at: tuple[int, ...] = (10, 20)
    warmup: int = 2  # first steps of each contender: not in any rate
    turn: int = 6  # steps
    problems: int = 256
    overrides: tuple[str, ...] = ()


QUICK = Settings(
    steps=3, save_at=(3,), warmup=1, turn=1, problems=8, overrides=("rollout.prompts=4", "optimizer.warmup_steps=1")
)


def run(out: Out = BENCH, quick: Quick = False) -> int:
    """Measure, write the JSON file, print the tables. Returns 0 whether or not the target is reached.

    Raises `UserError` when TRL or the tiny models are missing, or a contender ends early.
    """
    if not has_trl():
        raise UserError(f"trl is not in {BENCH_PACKAGES} and cannot be imported: run `make setup-bench`")
    settings = QUICK if quick else Settings()
    configs = {contender.name: make_config(contender, settings) for contender in CONTENDERS}
    if problems := check_train(configs["ours_prune"], 2, None, "never"):
        raise UserError("\n".join(problems))
    report = Report(out / "peers.json", quick, settings)
    with tempfile.TemporaryDirectory(prefix="prune-opd-") as name:
        folder = Path(name)
        for contender, config in configs.items():
            save_config(config, folder / contender / "config.yaml")
        steps = _take_turns(settings, folder, report.console)
        measured = {name: summarise(found, settings.warmup) for name, found in steps.items()}
        machine = report.environment()  # before the evaluation adds to the load
        report.console.print("evaluating")
        accuracies = _evaluate(configs["ours_opd"].student, settings, folder)
    compared = compare(measured, accuracies)
    result = report.write(recipe=RECIPE, environment=machine, contenders=measured, **compared)
    print_result(result, report.console)
    report.name_files()
    return 0


def make_config(contender: Contender, settings: Settings) -> TrainConfig:
    """The recipe as this contender runs it."""
    overrides = [f"steps={settings.steps}", *SAME_FOR_ALL, *settings.overrides, *contender.overrides]
    config = apply_overrides(load_recipe(RECIPE), overrides)
    assert isinstance(config, TrainConfig)
    return config


# ---------------------------------------------------------------------------------------------------- running


def _take_turns(settings: Settings, folder: Path, console: Console) -> dict[str, list[dict[str, Any]]]:
    """Start every contender, wait until all are built, and let one at a time go on for a turn. Returns their steps."""
    contests, found = {}, {}
    with ThreadPoolExecutor(len(CONTENDERS)) as pool, ExitStack() as stack:
        for contender in CONTENDERS:
            home, threads = folder / contender.name, contender.threads
            request = {"folder": str(home), "steps": _steps(contender, settings), "threads": threads}
            request["save_at"] = settings.save_at if contender.steps is None else ()
            how = {"request": request, "ranks": contender.ranks, "threads": threads, "env": contender.env}
            contest = Contest(pool, contender.name, contender.module, home, **how)
            contests[contender.name] = stack.enter_context(closing(contest))
        for contest in contests.values():
            contest.wait_for(1)
        for turn, end in enumerate(ends := turn_ends(settings)):
            for contender in rotated(CONTENDERS, turn):
                steps = _steps(contender, settings)
                if turn == 0 or ends[turn - 1] < steps:
                    console.print(f"{contender.name}: to step {min(end, steps)} of {steps}")
                    contests[contender.name].go_on(min(end, steps))
        for contender in CONTENDERS:
            path = folder / contender.name / "run" / "metrics.jsonl"
            metrics = read_metrics(path)[0] if contender.module == OURS else None
            found[contender.name] = join_ranks(contests[contender.name].steps(), metrics)
    return found


def _steps(contender: Contender, settings: Settings) -> int:
    return min(contender.steps or settings.steps, settings.steps)


def turn_ends(settings: Settings) -> list[int]:
    """The last step of each turn: first the warm-up, then `turn` steps at a time."""
    return [*range(settings.warmup, settings.steps, settings.turn), settings.steps]


def _evaluate(student: str, settings: Settings, folder: Path) -> dict[str, Any]:
    """Accuracy of the student and of everything saved: {"student": …, "trl/15": …}."""
    trained = [contender.name for contender in CONTENDERS if contender.steps is None]
    models = {"student": student}
    models |= {f"{name}/{step}": str(folder / name / f"hf-{step}") for name in trained for step in settings.save_at}
    config = str(folder / "ours_opd" / "config.yaml")
    request = {"models": models, "config_file": config, "problems": settings.problems}
    return measure("benchmarks.peers.accuracy", request, "the evaluation", ranks=2)[0]


# ---------------------------------------------------------------------------------------------------- comparing


def join_ranks(
    steps: Sequence[Sequence[dict[str, Any]]], metrics: Sequence[dict[str, Any]] | None
) -> list[dict[str, Any]]:
    """The slowest rank's seconds, all ranks' CPU seconds, peaks and tokens; of ours, tokens and phases from `metrics`.

    steps: each step as every rank measured it.
    """
    return [
        {
            "step": ranks[0]["step"],
            "wall_s": max(one["wall_s"] for one in ranks),
            "cpu_s": sum(one["cpu_s"] for one in ranks),
            "peak_bytes": sum(one["peak_bytes"] for one in ranks),
            "tokens": record.get("tokens_generated") or sum(one["tokens"] for one in ranks),
            **{phase: record[phase] for phase in PHASES if phase in record},
            **{key: sum(one[key] for one in ranks) for key in ranks[0] if key.startswith(MEMORY)},
        }
        for ranks, record in zip(steps, metrics or [{}] * len(steps), strict=True)
    ]


def summarise(steps: list[dict[str, Any]], warmup: int) -> dict[str, Any]:
    """Rates over the steps after the warm-up; the peak, and the tokens so far, are of all of them."""
    timed = steps[warmup:]
    wall, tokens = sum(step["wall_s"] for step in timed), sum(step["tokens"] for step in timed)
    so_far, total = {}, 0
    for step in steps:
        total += step["tokens"]
        so_far[str(int(step["step"]))] = total
    return {
        "tokens_per_s": tokens / wall,
        "cpu_s_per_1000_tokens": 1000 * sum(step["cpu_s"] for step in timed) / tokens,
        "step_s": median(step["wall_s"] for step in timed),
        "timed_steps": len(timed),
        "peak_bytes": max(step["peak_bytes"] for step in steps),
        "phases_s": {phase: median(step[phase] for step in timed) for phase in PHASES if phase in timed[0]},
        "owners_bytes": {key.removeprefix(MEMORY): size for key, size in steps[-1].items() if key.startswith(MEMORY)},
        "tokens_so_far": so_far,
        "steps": steps,
    }


def compare(measured: dict[str, Any], accuracies: dict[str, Any]) -> dict[str, Any]:
    """Each contender's curve of accuracy against tokens, accuracies at equal tokens, the ratio and the verdict."""
    trl = max((name for name in measured if name.startswith("trl")), key=lambda name: measured[name]["tokens_per_s"])
    rate = measured[trl]["tokens_per_s"]
    start = {"step": 0, "tokens": 0, **accuracies["student"]}
    curves: dict[str, list[dict[str, Any]]] = {}
    for key, accuracy in accuracies.items():
        name, _, step = key.partition("/")
        if step:
            tokens = measured[name]["tokens_so_far"][step]
            curves.setdefault(name, [start]).append({"step": int(step), "tokens": tokens, **accuracy})
    common = min(curve[-1]["tokens"] for curve in curves.values())
    last = curves["trl"][-1]
    noise = (last["stderr"] ** 2 + start["stderr"] ** 2) ** 0.5
    target = Target(
        f"tokens per second, ours_opd / {trl}", measured["ours_opd"]["tokens_per_s"] / rate, TARGET, at_least=True
    )
    return {
        "best_trl": trl,
        "ratios": {name: row["tokens_per_s"] / rate for name, row in measured.items()},
        "curves": curves,
        "equal_tokens": common,
        "accuracy_at_equal_tokens": {name: accuracy_at(curve, common) for name, curve in curves.items()},
        "trl_learned": last["accuracy"] - start["accuracy"] > 3 * noise,
        "targets": [target.record()],
    }


def accuracy_at(curve: Sequence[dict[str, Any]], tokens: float) -> float:
    """A curve's accuracy after `tokens` generated tokens, on the straight line between the evaluations around it."""
    return float(np.interp(tokens, [at["tokens"] for at in curve], [at["accuracy"] for at in curve]))


# ---------------------------------------------------------------------------------------------------- printing


def print_memory(contenders: dict[str, Any], console: Console) -> None:
    """Resident memory of all ranks after the last step by owner, and how much more a step takes at its peak."""
    names = list(dict.fromkeys(owner for row in contenders.values() for owner in row["owners_bytes"]))
    columns = {"": "{owner}"} | {name: f"{{{name}!m:.0f}}" for name in contenders}
    rows = [
        {"owner": owner} | {name: row["owners_bytes"].get(owner) for name, row in contenders.items()} for owner in names
    ]
    above = {name: row["peak_bytes"] - sum(row["owners_bytes"].values()) for name, row in contenders.items()}
    rows.append({"owner": "more at the peak"} | above)
    console.print(table("resident memory of all ranks after the last step, MiB", columns, rows))


def print_result(result: dict[str, Any], console: Console) -> None:
    settings = result["settings"]
    console.print(
        f"{result['recipe']}, {settings['steps']} updates, the first {settings['warmup']} of each contender not timed, "
        f"turns of {settings['turn']}; {load(result['environment'])}"
    )
    columns = {
        "": "{name}",
        "tokens/s": "{tokens_per_s:.0f}",
        f"÷ {result['best_trl']}": "{ratio:.2f}",
        "step s": "{step_s:.2f}",
        "CPU s / 1000 tokens": "{cpu_s_per_1000_tokens:.3f}",
        "peak memory MiB": "{peak_bytes!m:.0f}",
        "steps": "{timed_steps}",
        "our phases, s": "{phases}",
    }
    rows = []
    for name, row in result["contenders"].items():
        phases = ", ".join(f"{phase.removeprefix('time_')} {time:.2f}" for phase, time in row["phases_s"].items())
        rows.append({"name": name, "ratio": result["ratios"][name], "phases": phases, **row})
    console.print(table("a whole step", columns, rows))
    print_memory(result["contenders"], console)
    columns = {"": "{name}", "updates": "{step}", "tokens": "{tokens:,}", "accuracy": "{accuracy:.1%} ± {stderr:.1%}"}
    at_equal = result["accuracy_at_equal_tokens"]
    columns[f"after {result['equal_tokens']:,} tokens"] = "{at_equal:.1%}"
    rows = [
        {"name": name, "at_equal": at_equal[name] if point is curve[-1] else None, **point}
        for name, curve in result["curves"].items()
        for point in curve
    ]
    console.print(table(f"accuracy, {settings['problems']} held-out problems at T = 1", columns, rows))
    print_targets(result["targets"], console)
    learned = "[green]yes[/]" if result["trl_learned"] else "[red]no[/]"
    console.print(f"  {learned}   TRL's student learned (3 standard errors)")
