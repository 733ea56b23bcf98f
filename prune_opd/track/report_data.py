"""A finished (or still running) run as the report sees it: its records, totals, name and configuration."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from prune_opd.config.yaml import parse
from prune_opd.errors import UserError
from prune_opd.track.metrics import FILE_NAME, Record, read_doubts, read_metrics, total
from prune_opd.track.redact import redact
from prune_opd.track.samples import FILE_NAME as SAMPLES
from prune_opd.track.samples import read_samples, sample_doubts
from prune_opd.track.summary import Summary, summarise


@dataclass(frozen=True)
class RunData:
    """A run directory's contents. `max_len` is the full horizon in tokens, None if config.yaml does not have it."""

    name: str
    run_dir: Path
    steps: list[Record]
    evaluations: list[Record]
    samples: list[Record]  # of samples.jsonl
    doubts: list[str]  # what is wrong with its files: damaged lines, steps that stand there twice
    summary: Summary
    config_text: str | None
    config: dict[str, Any]  # of config.yaml; empty if there is none that can be read
    max_len: int | None

    def has(self, key: str) -> bool:
        """Whether any step has a finite value of the key (in a by-position list: any bin)."""
        values = (r.get(key) for r in self.steps)
        return any(
            not math.isnan(number(v)) for value in values for v in (value if isinstance(value, list) else [value])
        )

    def step_numbers(self) -> list[int]:
        return [r["step"] for r in self.steps]

    def series(self, key: str) -> list[float]:
        """The key over the steps; NaN where it is absent, null or not finite."""
        return [number(r.get(key)) for r in self.steps]

    def by_position(self, key: str) -> list[list[float]]:
        """A by-position list over the steps, one row a step, all of the same width; NaN where no token fell."""
        rows = [r.get(key) or [] for r in self.steps]
        width = max((len(row) for row in rows), default=0)
        return [[number(v) for v in row] + [math.nan] * (width - len(row)) for row in rows]

    def until(self, key: str) -> Callable[[int], float]:
        """A key added up over the steps up to and including a given one: tokens generated, training seconds."""
        return lambda step: total([r for r in self.steps if r["step"] <= step], key)

    def accuracy(
        self, task: str, x: Callable[[int], float] = float
    ) -> tuple[list[float], list[float], tuple[list[float], list[float]] | None]:
        """A task's evaluations: x (a function of the step), accuracy, and its distances to both ends of the interval.

        The 95 % interval is the recorded one, else 1.96 standard errors; None if neither is known.
        """
        key = f"eval_{task}"
        lines = [line for line in self.evaluations if line.get(key) is not None]
        reach = [_interval(line, key) for line in lines]
        known = None if any(math.isnan(end) for ends in reach for end in ends) else reach
        interval = None if known is None else ([low for low, _ in known], [high for _, high in known])
        return [x(line["step"]) for line in lines], [number(line[key]) for line in lines], interval

    @property
    def tasks(self) -> list[str]:
        return [accuracy.task for accuracy in self.summary.accuracy]


def _interval(line: Record, key: str) -> tuple[float, float]:
    """How far an accuracy's 95 % interval reaches below and above it; NaN if the line does not have it."""
    accuracy, low, high = (number(line.get(name)) for name in (key, f"{key}_low", f"{key}_high"))
    if math.isnan(low) or math.isnan(high):
        error = 1.96 * number(line.get(f"{key}_stderr"))
        return error, error
    return max(0.0, accuracy - low), max(0.0, high - accuracy)


def number(value: Any) -> float:
    """The value as a float that a chart can show: NaN for null and for what is not finite."""
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else math.nan


def load_run(run_dir: Path) -> RunData:
    """Reads a run directory.

    Raises:
        UserError: there is no metrics.jsonl, it is empty, or it cannot be read.
    """
    steps, evaluations = read_metrics(run_dir / FILE_NAME)
    doubts = read_doubts(run_dir / FILE_NAME) + sample_doubts(run_dir / SAMPLES)
    if not steps and not evaluations:
        why = "; ".join(doubts) or f"{run_dir / FILE_NAME} has no record yet"
        raise UserError(f"{why}: the report needs at least one finished step")
    config_file = run_dir / "config.yaml"
    text = redact(config_file.read_text(encoding="utf-8", errors="replace")) if config_file.is_file() else None
    config = _parse(text)
    name = config.get("name")
    horizon = config.get("horizon")
    max_len = horizon.get("max_len") if isinstance(horizon, dict) else None
    return RunData(
        name=redact(name if isinstance(name, str) and name else run_dir.resolve().name),
        run_dir=run_dir,
        steps=steps,
        evaluations=evaluations,
        samples=read_samples(run_dir / SAMPLES),
        doubts=[redact(doubt) for doubt in doubts],
        summary=summarise(steps, evaluations),
        config_text=text,
        config=config,
        max_len=max_len if isinstance(max_len, int) and max_len > 0 else None,
    )


def load_runs(run_dirs: list[Path]) -> list[RunData]:
    """Reads several run directories; runs of the same name are told apart by their directory."""
    runs = [load_run(run_dir) for run_dir in run_dirs]
    count = Counter(run.name for run in runs)
    runs = [run if count[run.name] == 1 else replace(run, name=f"{run.name} ({run.run_dir.name})") for run in runs]
    count = Counter(run.name for run in runs)
    return [run if count[run.name] == 1 else replace(run, name=str(run.run_dir)) for run in runs]


def _parse(text: str | None) -> dict[str, Any]:
    # A report on a run whose config.yaml was damaged is still worth having: its charts need only the metrics.
    try:
        config = parse(text or "")
    except yaml.YAMLError:
        return {}
    return config if isinstance(config, dict) else {}
