"""The comparison's page: tables, verdicts and charts, from the JSON file alone; one overview PNG a pair beside it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from html import escape
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.strategies.results import COLUMNS
from prune_opd.track.plotting import (
    CYCLE,
    Chart,
    accuracy_axis,
    axes,
    count_axis,
    from_zero,
    legend,
    overview_png,
    percent_axis,
)
from prune_opd.track.report import grid, write_page

Row = dict[str, Any]
SWEPT = "Prune-OPD (w_base 0, hit_if_reliable), all else the recipe's."
MARKERS = "osD^v<>P*XphHd"
DYNAMIC = ("full", "prune_paper", "prune_w0", "prune", "prune_top_p", "marginal", "popd", "inflight")


def write_charts(path: Path) -> Path:
    """Writes the page of a result file beside it, and PAIR.png in the folder of its runs. Returns the page's path."""
    result = json.loads(path.read_text(encoding="utf-8"))
    body = ["<header><h1>Strategies compared</h1></header>"]
    for pair, found in result["pairs"].items():
        charts = pair_charts(found["rows"])
        swept = result["sweeps"]["rows"] if pair == result["sweeps"]["pair"] else {}
        charts += [Chart(f"Sweep of {name}", SWEPT, partial(_sweep, rows=rows)) for name, rows in swept.items()]
        judged = "".join(f"<li>{escape(verdict['text'])}</li>" for verdict in found["verdicts"])
        body += [f"<h2>{escape(pair)}</h2>", _table(found["rows"]), f"<ul>{judged}</ul>"]
        for name, rows in swept.items():
            body += [f"<h3>Sweep of {escape(name)}</h3>", _table(rows)]
        body.append(grid(charts))
        picture = overview_png(f"Strategies on {pair}", f"seeds {result['seeds']}", charts)
        (path.with_suffix("") / f"{pair}.png").write_bytes(picture)
    page = path.with_suffix(".html")
    write_page("Strategies compared", body, page)
    return page


def pair_charts(rows: Sequence[Row]) -> list[Chart]:
    """Accuracy against cost, and how windows and overlap moved."""

    def chart(title: str, caption: str, draw: Any, of: Sequence[Row] = rows, **how: str) -> Chart:
        return Chart(title, caption, partial(draw, rows=of, **how))

    moving = [row for row in rows if row["method"] in DYNAMIC]
    few = [row for row in moving if row["method"] in ("full", "prune", "marginal")]
    better = "Up and to the left is better. Bars are one standard error over the seeds."
    means = "Means over the seeds; on fewer problems than at the end."
    easier = "Over the tokens that were generated: short prefixes have it easier. Overlap is not success."
    bins = "Bins of equal width over the full horizon; the first step is dashed."
    tokens, seconds = "response tokens generated", "CPU seconds of rollout, teacher and train"
    return [
        chart("Accuracy over generated tokens", better, _cost, key="tokens_generated", label=tokens),
        chart("Accuracy over training CPU seconds", better, _cost, key="cpu_s", label=seconds),
        chart("Accuracy on the way, over generated tokens", means, _curves, key="tokens", label=tokens),
        chart("Accuracy on the way, over training CPU seconds", means, _curves, key="cpu_s", label=seconds),
        chart("Window [tokens]", "Mean over the seeds.", _series, moving, key="horizon", label="tokens"),
        chart("Mean overlap", easier, _series, moving, key="overlap", label="mean overlap"),
        chart("Drift events", "Share of the generated tokens.", _series, moving, key="event_rate", label="share"),
        chart("Overlap by position, first step and last", bins, _positions, few),
    ]


def style(index: int) -> dict[str, Any]:
    return {"color": CYCLE[index % len(CYCLE)], "linestyle": ("-", "--", ":", "-.")[index // len(CYCLE) % 4]}


def _cost(figure: Any, rows: Sequence[Row], key: str, label: str) -> None:
    ax = axes(figure, label, "accuracy")
    for i, row in enumerate(rows):
        look = {"marker": MARKERS[i % len(MARKERS)], "color": CYCLE[i % len(CYCLE)], "label": row["method"]}
        errors = {"xerr": row[f"{key}_stderr"], "yerr": row["accuracy_stderr"]}
        ax.errorbar(row[key], row["accuracy"], **errors, **look, linestyle="none", capsize=2, elinewidth=0.8)
    ax.set_xlim(left=0)
    accuracy_by_count(ax)


def _curves(figure: Any, rows: Sequence[Row], key: str, label: str) -> None:
    ax = axes(figure, f"{label} so far", "accuracy")
    for i, row in enumerate(rows):
        curves = [run["curve"] for run in row["runs"]]
        x, y = ([fmean(p[name] for p in points) for points in zip(*curves, strict=True)] for name in (key, "accuracy"))
        ax.plot(x, y, label=row["method"], marker=MARKERS[i % len(MARKERS)], markersize=3, **style(i))
    accuracy_by_count(ax)


def accuracy_by_count(ax: Any, size: int = 7) -> None:
    accuracy_axis(ax)
    count_axis(ax.xaxis)
    legend(ax, ncols=5, fontsize=size)


def _series(figure: Any, rows: Sequence[Row], key: str, label: str) -> None:
    named = {row["method"]: [run[key] for run in row["runs"]] for row in rows}
    ax = series(figure, label, named, zero=key != "overlap")
    if key == "event_rate":
        percent_axis(ax.yaxis)


def series(
    figure: Any, label: str, named: Mapping[str, Sequence[Sequence[float]]], zero: bool, every: int = 1, size: int = 7
) -> Any:
    """The mean of each method's curves over the steps. every: steps between two values. size: of the legend's text."""
    ax = axes(figure, "step", label)
    for i, (name, curves) in enumerate(named.items()):
        values = [fmean(at) for at in zip(*curves, strict=True)]
        ax.plot(range(1, 1 + every * len(values), every), values, label=name, **style(i))
    if zero:
        from_zero(ax)
    count_axis(ax.xaxis)
    legend(ax, ncols=4, fontsize=size)
    return ax


def _positions(figure: Any, rows: Sequence[Row]) -> None:
    ax = axes(figure, "position, share of the full horizon", "mean overlap")
    for i, row in enumerate(rows):
        for when, line in ((0, "--"), (1, "-")):
            curves = [run["overlap_by_position"][when] for run in row["runs"]]
            pairs = [
                ((place + 0.5) / len(curves[0]), fmean(v for v in at if v is not None))
                for place, at in enumerate(zip(*curves, strict=True))
                if any(v is not None for v in at)
            ]
            ax.plot(*zip(*pairs, strict=True), color=CYCLE[i], linestyle=line, label=row["method"] if when else None)
    legend(ax)


def _sweep(figure: Any, rows: Sequence[Row]) -> None:
    ax = axes(figure, "", "share")
    places = range(len(rows))
    for i, (label, key) in enumerate((("accuracy", "accuracy"), ("tokens saved", "saved_tokens_generated"))):
        ax.plot(places, [row[key] for row in rows], marker="o", color=CYCLE[i], label=label)
    ax.set_xticks(list(places), [f"{row['value']:g}" for row in rows])
    percent_axis(ax.yaxis)
    legend(ax)


def _table(rows: Sequence[Row]) -> str:
    return compare_table(COLUMNS, ([cell(row) for cell in COLUMNS.values()] for row in rows))


def compare_table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A table of methods as HTML, from its cells as text."""
    lines = [f"<tr>{''.join(f'<th>{escape(name)}</th>' for name in head)}</tr>"]
    lines += [f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows]
    return f'<div class="wide"><table class="compare">{"".join(lines)}</table></div>'
