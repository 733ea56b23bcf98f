"""The runs of the comparison as a row for each method and pair, and the verdicts on the targets.

Means are over seeds, with the standard error of the mean; savings are against full OPD of the same seed. So are gaps in
accuracy: runs of one seed share data and problems, so their difference is known better than either accuracy.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import numpy as np

from benchmarks.common import mean_and_error
from benchmarks.strategies.plan import COST, METHODS, STOP, Method, sweeps
from benchmarks.strategies.runs import Result
from prune_opd.config import TrainConfig
from prune_opd.track.metrics import Record, task_names, total

PHASES = ("sync", "rollout", "teacher", "train")
PRUNING = ("prune", "prune_w0", "prune_paper", "prune_top_p", "marginal", "marginal_paper", "inflight", "kat")
TRUNCATED = ("topd_10", "topd_25", "fixed", "full")  # fixed windows, from the shortest to all
SAVED, MOST_COST = 0.376, 1.05  # the targets
STOPPING = {method.name: method.against for method in METHODS if set(STOP) <= set(method.changes)}
DRIFTING = 0.1  # a pair drifts if this share of its tokens lies beyond the reliable length without the in-flight stop
CUT, OVERHEAD = 0.6, 0.05  # the stop's targets: share of those tokens cut; where few are, how much longer a step is
WARMUP = 1  # steps that a step's time leaves out


@dataclass(frozen=True)
class Verdict:
    pair: str
    method: str
    target: str
    reached: bool
    numbers: str

    def __str__(self) -> str:
        return f"{'reached' if self.reached else 'missed'}: {self.pair}, {self.method}: {self.target}: {self.numbers}"


def generated(steps: list[Record]) -> float:
    """Response tokens that were generated, also those that an in-flight stop threw away."""
    return total(steps, "tokens_generated") + total(steps, "tokens_dropped")


def step_numbers(steps: list[Record]) -> dict[str, float]:
    """Means over the steps: time, tokens beyond the reliable length, and what the in-flight stop did."""

    def mean(key: str, of: Sequence[Record] = steps) -> float:
        return fmean(float(record.get(key, 0)) for record in of)

    timed = steps[WARMUP:] or steps
    return {
        "wall_s": mean("time_step", timed),
        "cpu_s": mean("cpu_step", timed),
        "tokens": mean("tokens_generated"),
        # responses = tokens_trained / response_length
        "tokens_beyond": fmean(
            record["tokens_trained"] * (1 - record["reliable_length"] / record["response_length"]) for record in steps
        ),
        "stopped": mean("pruned_inflight"),
        "too_early": mean("inflight_too_early"),
        "looks": mean("inflight_checks"),
        "look_s": mean("time_inflight", timed),
        "teacher_tokens": mean("teacher_tokens_inflight"),
    }


def run_numbers(steps: list[Record], evaluations: list[Record]) -> dict[str, Any]:
    """One run: accuracy before and after, costs, and the curves over its steps and evaluations."""
    (task,) = task_names(evaluations[-1])
    key = f"eval_{task}"
    curve = []
    for line in evaluations:
        before = [record for record in steps if record["step"] <= line["step"]]
        curve.append(
            {
                "step": line["step"],
                "accuracy": line[key],
                "tokens": generated(before),
                "cpu_s": sum(total(before, f"cpu_{phase}") for phase in COST),
            }
        )
    return {
        "accuracy_before": evaluations[0][key],
        "accuracy": evaluations[-1][key],
        "accuracy_stderr_of_problems": evaluations[-1][f"{key}_stderr"],
        "tokens_generated": generated(steps),
        "tokens_trained": total(steps, "tokens_trained"),
        "wall_s": sum(total(steps, f"time_{phase}") for phase in COST),
        "cpu_s": sum(total(steps, f"cpu_{phase}") for phase in COST),
        "phases_wall_s": {phase: total(steps, f"time_{phase}") for phase in PHASES},
        "phases_cpu_s": {phase: total(steps, f"cpu_{phase}") for phase in PHASES},
        "step": step_numbers(steps),
        "curve": curve,
        "horizon": [record["horizon"] for record in steps],
        "overlap": [record["overlap"] for record in steps],
        "event_rate": [record["event_rate"] for record in steps],
        "overlap_by_position": [steps[0]["overlap_by_position"], steps[-1]["overlap_by_position"]],
    }


def pair_rows(pair: str, methods: Iterable[Method], results: Sequence[Result]) -> list[dict[str, Any]]:
    """A row for every method that ran on the pair, with its seeds' numbers."""
    runs = {
        (spec.method.name, spec.seed): run_numbers(steps, evaluations)
        for spec, steps, evaluations in results
        if spec.pair == pair
    }
    rows = []
    for method in methods:
        mine = {seed: run for (name, seed), run in sorted(runs.items()) if name == method.name}
        if not mine:
            continue
        row: dict[str, Any] = {"method": method.name, "title": method.title, "seeds": list(mine)}
        row["runs"] = own = list(mine.values())
        for name in ("accuracy", "accuracy_before", "tokens_generated", "tokens_trained", "wall_s", "cpu_s"):
            row[name], row[f"{name}_stderr"] = mean_and_error([run[name] for run in own])
        for kind in ("phases_wall_s", "phases_cpu_s", "step"):
            row[kind] = {name: fmean(run[kind][name] for run in own) for name in own[0][kind]}
        for name in ("tokens_generated", "wall_s", "cpu_s"):
            saved = [1 - run[name] / runs["full", seed][name] for seed, run in mine.items() if ("full", seed) in runs]
            row[f"saved_{name}"] = fmean(saved) if saved else None
        row["gaps"] = {}  # accuracy minus another method's, over the seeds that both have
        for other in dict.fromkeys(("full", method.against or "full")):
            gaps = [
                run["accuracy"] - runs[other, seed]["accuracy"] for seed, run in mine.items() if (other, seed) in runs
            ]
            if gaps and other != method.name:
                row["gaps"][other] = mean_and_error(gaps)
        row["final_horizons"] = [run["horizon"][-1] for run in own]
        rows.append(row)
    return rows


def sweep_rows(
    pair: str, recipe: TrainConfig, seeds: Sequence[int], results: Sequence[Result]
) -> dict[str, list[dict[str, Any]]]:
    """The rows of every sweep in the order of its values, over `seeds`."""
    of_seeds = [result for result in results if result[0].seed in seeds]
    found: dict[str, list[dict[str, Any]]] = {}
    for name, points in sweeps(recipe).items():
        values = {method.name: value for value, method in points.items()}
        if rows := pair_rows(pair, points.values(), of_seeds):
            found[name] = [{**row, "value": values[row["method"]]} for row in rows]
    return found


# ---------------------------------------------------------------------------------------------------- verdicts


def verdicts(pair: str, max_len: int, rows: Sequence[dict[str, Any]]) -> list[Verdict]:
    """The targets of a drift or trap pair, by its name, or of a compatible one, for every pruning method."""
    by_name = {row["method"]: row for row in rows if row["saved_cpu_s"] is not None}  # some seed has full OPD too
    judge = _drift_verdicts if "drift" in pair or "trap" in pair else _compatible_verdicts
    found = [verdict for name in PRUNING if name in by_name for verdict in judge(pair, max_len, by_name, by_name[name])]
    for on, off in STOPPING.items():
        if on in by_name and off in by_name:
            found += stop_verdicts(pair, by_name[off], by_name[on])
    return found


def stop_verdicts(pair: str, off: dict[str, Any], on: dict[str, Any]) -> list[Verdict]:
    """What the in-flight stop does to a method without it: it cuts the tail where there is one, else it is cheap."""
    without, with_stop = off["step"], on["step"]
    drifts = without["tokens_beyond"] > DRIFTING * without["tokens"]
    slowest = 1 if drifts else 1 + OVERHEAD
    found = []
    if drifts:
        cut = 1 - with_stop["tokens_beyond"] / without["tokens_beyond"]
        target = f"cuts ≥ {CUT:.0%} of the tokens beyond the reliable length"
        found.append(Verdict(pair, on["method"], target, cut >= CUT, f"{cut:.1%}"))
    for what, key in (("wall clock", "wall_s"), ("CPU seconds", "cpu_s")):
        ratio = with_stop[key] / without[key]
        target = f"a step takes at most {slowest:g} of the {what} of {off['method']}"
        found.append(Verdict(pair, on["method"], target, ratio <= slowest, f"{ratio:.2f}"))
    lost, error = off["accuracy"] - on["accuracy"], math.hypot(*(_accuracy_error(row) for row in (off, on)))
    target = f"accuracy not below that of {off['method']} by more than the standard error of the difference"
    return [*found, Verdict(pair, on["method"], target, lost <= error, f"{-lost:+.1%} (± {error:.1%})")]


def _accuracy_error(row: dict[str, Any]) -> float:
    """Standard error over the seeds; with a single seed, over its problems."""
    error = row["accuracy_stderr"]
    return float(row["runs"][0]["accuracy_stderr_of_problems"] if error is None else error)


def _drift_verdicts(pair: str, max_len: int, by_name: dict[str, Any], row: dict[str, Any]) -> list[Verdict]:
    full, name, accuracy = by_name["full"], row["method"], row["accuracy"]
    error = full["accuracy_stderr"] or 0.0
    cpu, tokens = row["saved_cpu_s"], row["saved_tokens_generated"]
    beside = f"{cpu:.1%} (wall clock {row['saved_wall_s']:.1%})"
    level = f"{accuracy:.1%} against {full['accuracy']:.1%} ± {error:.1%}"
    floor = "accuracy not below full OPD's by more than its standard error"
    found = [
        Verdict(pair, name, f"saves ≥ {SAVED:.1%} of training CPU seconds", cpu >= SAVED, beside),
        Verdict(pair, name, f"saves ≥ {SAVED:.1%} of generated tokens", tokens >= SAVED, f"{tokens:.1%}"),
        Verdict(pair, name, floor, accuracy >= full["accuracy"] - error, level),
    ]
    truncated = truncation_at(row["tokens_generated"], by_name)
    if truncated is not None:
        numbers = f"{accuracy:.1%} against {truncated:.1%} at {row['tokens_generated']:,.0f} tokens"
        target = "at least as accurate as a fixed window (TOPD, between the windows that ran) at equal tokens"
        found.append(Verdict(pair, name, target, accuracy >= truncated, numbers))
    return found


def _compatible_verdicts(pair: str, max_len: int, by_name: dict[str, Any], row: dict[str, Any]) -> list[Verdict]:
    full, name, last = by_name["full"], row["method"], row["final_horizons"]
    cpu, tokens = 1 - row["saved_cpu_s"], 1 - row["saved_tokens_generated"]
    error = math.hypot(row["accuracy_stderr"] or 0.0, full["accuracy_stderr"] or 0.0)
    opened, cheap = all(horizon == max_len for horizon in last), max(cpu, tokens) <= MOST_COST
    costs = f"{cpu:.2f} of its CPU seconds, {tokens:.2f} of its tokens"
    level = f"{row['accuracy']:.1%} against {full['accuracy']:.1%} (± {error:.1%})"
    equal = "accuracy equal to full OPD's within the standard error of the difference, or above"
    return [
        Verdict(pair, name, f"the window opens to {max_len}", opened, f"last windows {last}"),
        Verdict(pair, name, "cost at most 5 % above full OPD's", cheap, costs),
        Verdict(pair, name, equal, row["accuracy"] - full["accuracy"] >= -error, level),
    ]


def truncation_at(tokens: float, by_name: dict[str, Any]) -> float | None:
    """Accuracy of a fixed window at this cost in generated tokens, linear between the two windows around it."""
    points = sorted((by_name[name] for name in TRUNCATED if name in by_name), key=lambda row: row["tokens_generated"])
    if not points:
        return None
    return float(np.interp(tokens, [at["tokens_generated"] for at in points], [at["accuracy"] for at in points]))


# ---------------------------------------------------------------------------------------------------- tables

Cell = Callable[[dict[str, Any]], str]
COLUMNS: dict[str, Cell] = {
    "method": lambda row: row["title"],
    "accuracy": lambda row: with_error(row["accuracy"], row["accuracy_stderr"]),
    "points to full OPD": lambda row: in_points(row["gaps"].get("full")),
    "generated": lambda row: f"{row['tokens_generated'] / 1e3:,.0f} k",
    "trained": lambda row: f"{row['tokens_trained'] / 1e3:,.0f} k",
    "rollout s": lambda row: _seconds(row, "rollout"),
    "teacher s": lambda row: _seconds(row, "teacher"),
    "train s": lambda row: _seconds(row, "train"),
    "tokens saved": lambda row: share(row["saved_tokens_generated"]),
    "CPU s saved": lambda row: share(row["saved_cpu_s"]),
    "wall s saved": lambda row: share(row["saved_wall_s"]),
    "last window": lambda row: f"{fmean(row['final_horizons']):.0f}",
}
"""Accuracy, and its gap to full OPD of the same seed, are mean ± standard error. Seconds are CPU (wall clock)."""


def with_error(value: float, error: float | None, form: str = ".1f", unit: str = "%") -> str:
    return f"{100 * value:{form}}{unit}" + ("" if error is None else f" ± {100 * error:.1f}")


def in_points(gap: tuple[float, float | None] | None) -> str:
    """A gap in accuracy as percentage points."""
    return "–" if gap is None else with_error(*gap, "+.1f", "")


def share(value: float | None) -> str:
    return "–" if value is None else f"{value:.1%}"


def _seconds(row: dict[str, Any], phase: str) -> str:
    return f"{row['phases_cpu_s'][phase]:.1f} ({row['phases_wall_s'][phase]:.1f})"


STEP_LINES = {
    "response tokens": ("tokens", 0),
    "of these beyond the reliable length": ("tokens_beyond", 0),
    "responses stopped": ("stopped", 1),
    "of these too early": ("too_early", 1),
    "looks of the teacher in flight": ("looks", 1),
    "tokens that it read then": ("teacher_tokens", 0),
    "seconds of the looks": ("look_s", 2),
    "CPU seconds": ("cpu_s", 2),
    "wall clock s": ("wall_s", 2),
}


def markdown(title: str, rows: Sequence[dict[str, Any]], judged: Sequence[Verdict], notes: Sequence[str]) -> str:
    """The tables, their notes and their verdicts as Markdown."""
    lines = [f"### {title}", "", *_table(COLUMNS, ([cell(row) for cell in COLUMNS.values()] for row in rows))]
    stopping = {name for row in rows if (name := row["method"]) in STOPPING}
    shown = [row for row in rows if row["method"] in stopping | {STOPPING[name] for name in stopping}]
    if shown:  # a step with an in-flight stop and without, a column a method
        steps = (
            [label, *(f"{row['step'][key]:,.{digits}f}" for row in shown)]
            for label, (key, digits) in STEP_LINES.items()
        )
        lines += ["", *_table(["a step", *(row["method"] for row in shown)], steps)]
    lines += ["", *(f"{note}  " for note in notes), "", *(f"- {verdict}" for verdict in judged), ""]
    return "\n".join(lines)


def _table(head: Collection[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table whose first column holds names."""
    written = ["| " + " | ".join(cells) + " |" for cells in (head, *rows)]
    return [written[0], "|---|" + "--:|" * (len(head) - 1), *written[1:]]
