"""The charts that put several runs side by side, and the settings in which they differ."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from functools import partial
from typing import Any

from prune_opd.config.yaml import on_one_line
from prune_opd.track.metrics import total
from prune_opd.track.plotting import (
    CYCLE,
    MUTED,
    PHASE_COLOURS,
    Chart,
    accuracy_axis,
    axes,
    count_axis,
    from_zero,
    legend,
    time_unit,
    trend,
)
from prune_opd.track.report_data import RunData

ABSENT = "–"  # what stands in a table where a run has nothing
_NOTHING = object()  # a setting that a config.yaml of an older version has not got


def different_settings(runs: list[RunData]) -> dict[str, list[str]]:
    """Dotted key → each run's value as YAML, of the settings in which runs differ. Their names are left out.

    A run without a config.yaml differs in nothing. A part that only some runs have (`gate`) is one setting.
    """
    known = [run for run in runs if run.config]
    found = {}
    for key, values in _differences([run.config | {"name": None} for run in known], ""):
        texts = iter(ABSENT if value is _NOTHING else on_one_line(value) for value in values)
        found[key] = [next(texts) if run.config else ABSENT for run in runs]
    return found


def _differences(values: list[Any], key: str) -> Iterator[tuple[str, list[Any]]]:
    """The settings below `key` in which the values, one of each run, differ."""
    if values and all(isinstance(value, dict) for value in values):
        for name in dict.fromkeys(name for value in values for name in value):
            below = [value.get(name, _NOTHING) for value in values]
            yield from _differences(below, f"{key}.{name}" if key else str(name))
    elif any(value != values[0] for value in values):
        yield key, values


def comparison_charts(runs: list[RunData]) -> list[Chart]:
    """Totals, and accuracy over tokens and time for the tasks that runs share (for all, if they share none)."""
    count = Counter(task for run in runs for task in run.tasks)
    tasks = [task for task in count if count[task] > 1] or list(count)
    charts = _accuracy_charts(runs, tasks[:1])
    for key, title, caption in (
        ("horizon", "Horizon [tokens]", "The horizon that each strategy gave the rollouts of a step."),
        (
            "overlap",
            "Mean overlap",
            "Over the tokens that were generated: a run that only looks at short prefixes has it easier. "
            "Overlap is not success: read it with the accuracy.",
        ),
    ):
        if any(run.has(key) for run in runs):
            charts.append(Chart(title, caption, partial(_compare_series, runs=runs, key=key)))
    if any(run.summary.seconds for run in runs):
        charts.append(
            Chart(
                "Where the time went",
                "Time of the whole run by phase, evaluation included.",
                partial(_compare_phases, runs=runs),
            )
        )
    if any(run.has("tokens_generated") for run in runs):
        charts.append(
            Chart(
                "Tokens generated",
                "What each run generated. The outline is its own estimate of the same steps at the full horizon.",
                partial(_compare_tokens, runs=runs),
            )
        )
    return charts + _accuracy_charts(runs, tasks[1:])


def _accuracy_charts(runs: list[RunData], tasks: list[str]) -> list[Chart]:
    charts = []
    for task in tasks:
        charts += [
            Chart(
                f"Accuracy over generated tokens: {task} [%]",
                "Up and to the left is better: more accuracy for fewer generated tokens. Bars are 95 % intervals.",
                partial(_compare_accuracy, runs=runs, task=task, over="tokens"),
            ),
            Chart(
                f"Accuracy over training time: {task} [%]",
                "The same over the time of training, evaluation not counted. Compare only runs on the same hardware.",
                partial(_compare_accuracy, runs=runs, task=task, over="seconds"),
            ),
        ]
    return charts


def _compare_accuracy(fig: Any, runs: list[RunData], task: str, over: str) -> None:
    label, size, key = "response tokens generated so far", 1.0, "tokens_generated"
    if over == "seconds":
        unit, size = time_unit(max(total(run.steps, "time_step") for run in runs))
        label, key = f"training time [{unit}]", "time_step"
    ax = axes(fig, label, "accuracy")
    for i, run in enumerate(runs):
        x, y, error = run.accuracy(task, run.until(key))
        x = [value / size for value in x]
        if x:
            ax.errorbar(x, y, yerr=error, marker="o", capsize=3, elinewidth=1, **_style(i, run))
    accuracy_axis(ax)
    if over == "tokens":
        count_axis(ax.xaxis)
    legend(ax)


def _compare_series(fig: Any, runs: list[RunData], key: str) -> None:
    ax = axes(fig, "step", "tokens" if key == "horizon" else "mean overlap")
    for i, run in enumerate(runs):
        if not run.has(key):
            continue
        if key == "horizon":
            ax.step(run.step_numbers(), run.series(key), where="mid", **_style(i, run))
        else:
            trend(ax, run.step_numbers(), run.series(key), **_style(i, run))
    if key == "horizon":
        from_zero(ax)
        count_axis(ax.yaxis)
    count_axis(ax.xaxis)
    legend(ax)


def _compare_phases(fig: Any, runs: list[RunData]) -> None:
    unit, size = time_unit(max(run.summary.seconds for run in runs))
    ax = axes(fig, f"time [{unit}]", "")
    left = [0.0] * len(runs)
    for label, colour in PHASE_COLOURS.items():
        widths = [run.summary.phases.get(label, 0.0) / size for run in runs]
        if any(widths):
            ax.barh(range(len(runs)), widths, left=left, color=colour, label=label, height=0.6)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    _run_rows(ax, [_short(run.name) for run in runs])
    legend(ax, ncols=6, columnspacing=1.0, handlelength=0.9, handletextpad=0.4)


def _compare_tokens(fig: Any, runs: list[RunData]) -> None:
    ax = axes(fig, "response tokens", "")
    for i, run in enumerate(runs):
        ax.barh(i, run.summary.tokens_generated, color=CYCLE[i % len(CYCLE)], height=0.6)
        if run.summary.tokens_full is not None:
            ax.barh(i, run.summary.tokens_full, facecolor="none", edgecolor=MUTED, linestyle="--", height=0.6)
        if run.summary.saved is not None:
            most = max(run.summary.tokens_generated, run.summary.tokens_full or 0)
            saved = run.summary.saved
            ax.text(most, i, f" {abs(saved):.0%} {'saved' if saved >= 0 else 'more'}", va="center", fontsize=8.5)
    ax.margins(x=0.18)
    ax.set_xlim(left=0)
    _run_rows(ax, [_short(run.name) for run in runs])
    count_axis(ax.xaxis)


def _run_rows(ax: Any, names: list[str]) -> None:
    ax.set_yticks(range(len(names)), names)
    ax.invert_yaxis()
    ax.grid(axis="y", visible=False)
    ax.tick_params(axis="y", length=0)


def _style(index: int, run: RunData) -> dict[str, Any]:
    line = ("-", "--", ":", "-.")[index // len(CYCLE) % 4]
    return {"color": CYCLE[index % len(CYCLE)], "linestyle": line, "label": _short(run.name)}


def _short(name: str) -> str:
    return name if len(name) <= 28 else name[:13] + "…" + name[-14:]
