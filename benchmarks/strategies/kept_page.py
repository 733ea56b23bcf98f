"""The page of the kept comparison, DIR/kept.html: a table and curves for each pair, from the kept lines alone."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from html import escape
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.strategies.charts import MARKERS, accuracy_by_count, compare_table, series, style
from benchmarks.strategies.kept import EVERY, HEAD, Line, Row, cells, rows
from prune_opd.track.plotting import CYCLE, Chart, axes, legend, percent_axis
from prune_opd.track.report import grid, write_page

OURS, FIXED = ("change_point", "from_the_top"), ("full", "topd_25", "esr")
SMALL = 6  # points: a legend of some twenty methods
NOTE = "Points are to full OPD of the same seed, mean ± standard error over seeds. ●: none has more and saves more."


def write_kept_page(lines: Sequence[Line], path: Path) -> None:
    """Write the page of lines that are valid now."""
    body = [f"<header><h1>The comparison's kept runs</h1><p>{escape(NOTE)}</p></header>"]
    for pair in dict.fromkeys(line["pair"] for line in lines):
        found = rows(lines, pair)
        body += [f"<h2>{escape(pair)}</h2>", compare_table(HEAD, map(cells, found)), grid(pair_charts(found))]
    write_page("The comparison's kept runs", body, path)


def pair_charts(found: Sequence[Row]) -> list[Chart]:
    """Points against tokens saved, then curves of the methods whose kept runs have some."""
    means = "Means over the seeds; on fewer problems than at the end."
    moving = [row for row in found if row.method.name not in FIXED]
    return [
        Chart(
            "Points to full OPD over tokens saved",
            "Up and to the right is better. Bars are one standard error over the seeds; crosses have one seed.",
            partial(_front, found=found),
        ),
        Chart("Accuracy on the way, over generated tokens", means, partial(_accuracy, found=found)),
        Chart("Window [tokens]", "Mean over the seeds.", partial(_series, found=moving, key="windows", label="tokens")),
        Chart(
            "Mean overlap",
            "Over the tokens that were generated: short prefixes have it easier. Overlap is not success.",
            partial(_series, found=found, key="overlaps", label="mean overlap"),
        ),
    ]


def _front(figure: Any, found: Sequence[Row]) -> None:
    ax = axes(figure, "response tokens saved", "points to full OPD")
    ax.axhline(0, color="#8a949f", linewidth=0.8)
    for place, row in enumerate(found):
        marker = "x" if row.error is None else MARKERS[place % len(MARKERS)]
        look = {"color": CYCLE[place % len(CYCLE)], "marker": marker, "label": row.method.name}
        big = 8 if row.method.name in OURS else 5
        ax.errorbar(row.tokens, row.points, yerr=row.error, markersize=big, linestyle="none", capsize=2, **look)
    percent_axis(ax.xaxis)
    legend(ax, ncols=5, fontsize=SMALL)


def _accuracy(figure: Any, found: Sequence[Row]) -> None:
    ax = axes(figure, "response tokens generated so far", "accuracy")
    for place, row in enumerate(found):
        if curves := _of_all(row, "evaluations"):
            points = [[fmean(column) for column in zip(*at, strict=True)] for at in zip(*curves, strict=True)]
            ax.plot([at[1] for at in points], [at[2] for at in points], label=row.method.name, **style(place))
    accuracy_by_count(ax, SMALL)


def _series(figure: Any, found: Sequence[Row], key: str, label: str) -> None:
    named = {row.method.name: curves for row in found if (curves := _of_all(row, key))}
    series(figure, label, named, zero=key == "windows", every=EVERY, size=SMALL)


def _of_all(row: Row, key: str) -> list[list[Any]]:
    """The curves of the seeds that have one: the first lines were kept without."""
    return [run.line[key] for run in row.runs.values() if key in run.line]
