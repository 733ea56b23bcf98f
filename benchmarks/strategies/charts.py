"""The comparison's page: tables, verdicts and charts, from the JSON file alone; one overview PNG a pair beside it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from html import escape
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.strategies.results import COLUMNS, cells, share, with_error
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
MARKERS = "osD^v<>P*XphHd"
DYNAMIC = ("full", "prune_paper", "prune_w0", "prune", "prune_top_p", "marginal", "popd", "inflight")


def write_charts(path: Path) -> Path:
    """Writes the page of a result file beside it, and PAIR.png in the folder of its runs. Returns the page's path."""
    result = json.loads(path.read_text(encoding="utf-8"))
    body = ["<header><h1>Strategies compared</h1></header>"]
    for pair, found in result["pairs"].items():
        charts = pair_charts(found["rows"])
        swept = result["sweeps"]["rows"] if pair == result["sweeps"]["pair"] else {}
        charts += [sweep_chart(name, rows) for name, rows in swept.items()]
        judged = "".join(f"<li>{escape(verdict['text'])}</li>" for verdict in found["verdicts"])
        body += [f"<h2>{escape(pair)}</h2>", _table(list(COLUMNS), cells(found["rows"])), f"<ul>{judged}</ul>"]
        for name, rows in swept.items():
            body += [
                f"<h3>Sweep of {escape(name)}</h3>",
                _table(["value", *_SWEEP], [_sweep_cells(row) for row in rows]),
            ]
        body.append(grid(charts))
        picture = overview_png(f"Strategies on {pair}", f"seeds {result['seeds']}", charts)
        (path.with_suffix("") / f"{pair}.png").write_bytes(picture)
    page = path.with_suffix(".html")
    write_page("Strategies compared", body, page)
    return page


def pair_charts(rows: Sequence[Row]) -> list[Chart]:
    """Accuracy against cost, and how windows and overlap moved."""
    moving = [row for row in rows if row["method"] in DYNAMIC]
    better = "Up and to the left is better. Bars are one standard error over the seeds."
    return [
        Chart("Accuracy over generated tokens", better, partial(_cost, rows=rows, key="tokens_generated")),
        Chart("Accuracy over training CPU seconds", better, partial(_cost, rows=rows, key="cpu_s")),
        Chart(
            "Accuracy on the way, over generated tokens",
            "Means over the seeds; on fewer problems than at the end.",
            partial(_curves, rows=rows, key="tokens"),
        ),
        Chart(
            "Accuracy on the way, over training CPU seconds",
            "The same over the CPU seconds of rollout, teacher and train.",
            partial(_curves, rows=rows, key="cpu_s"),
        ),
        Chart("Window [tokens]", "Mean over the seeds.", partial(_series, rows=moving, key="horizon", label="tokens")),
        Chart(
            "Mean overlap",
            "Over the tokens that were generated: short prefixes have it easier. Overlap is not success.",
            partial(_series, rows=moving, key="overlap", label="mean overlap"),
        ),
        Chart(
            "Drift events",
            "Share of the generated tokens.",
            partial(_series, rows=moving, key="event_rate", label="share"),
        ),
        Chart(
            "Overlap by position, first step and last",
            "Bins of equal width over the full horizon; the first step is dashed.",
            partial(_positions, rows=[row for row in moving if row["method"] in ("full", "prune", "marginal")]),
        ),
    ]


def sweep_chart(setting: str, rows: Sequence[Row]) -> Chart:
    return Chart(
        f"Sweep of {setting}",
        "Prune-OPD (w_base 0, hit_if_reliable), all else the recipe's.",
        partial(_sweep, rows=rows),
    )


def _style(index: int) -> dict[str, Any]:
    return {"color": CYCLE[index % len(CYCLE)], "linestyle": ("-", "--", ":")[index // len(CYCLE) % 3]}


def _cost(figure: Any, rows: Sequence[Row], key: str) -> None:
    ax = axes(figure, "response tokens generated" if key == "tokens_generated" else "CPU seconds", "accuracy")
    for i, row in enumerate(rows):
        ax.errorbar(
            row[key],
            row["accuracy"],
            xerr=row[f"{key}_stderr"],
            yerr=row["accuracy_stderr"],
            marker=MARKERS[i % len(MARKERS)],
            color=CYCLE[i % len(CYCLE)],
            linestyle="none",
            capsize=2,
            elinewidth=0.8,
            label=row["method"],
        )
    accuracy_axis(ax)
    ax.set_xlim(left=0)
    count_axis(ax.xaxis)
    legend(ax, ncols=5, fontsize=7)


def _curves(figure: Any, rows: Sequence[Row], key: str) -> None:
    ax = axes(figure, "response tokens generated so far" if key == "tokens" else "CPU seconds so far", "accuracy")
    for i, row in enumerate(rows):
        curves = [run["curve"] for run in row["runs"]]
        x, y = ([fmean(p[name] for p in points) for points in zip(*curves, strict=True)] for name in (key, "accuracy"))
        ax.plot(x, y, label=row["method"], marker=MARKERS[i % len(MARKERS)], markersize=3, **_style(i))
    accuracy_axis(ax)
    count_axis(ax.xaxis)
    legend(ax, ncols=5, fontsize=7)


def _series(figure: Any, rows: Sequence[Row], key: str, label: str) -> None:
    ax = axes(figure, "step", label)
    for i, row in enumerate(rows):
        values = [fmean(at) for at in zip(*(run[key] for run in row["runs"]), strict=True)]
        ax.plot(range(1, len(values) + 1), values, label=row["method"], **_style(i))
    if key != "overlap":
        from_zero(ax)
    if key == "event_rate":
        percent_axis(ax.yaxis)
    count_axis(ax.xaxis)
    legend(ax, ncols=4, fontsize=7)


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


_SWEEP = ("accuracy", "tokens saved", "CPU s saved", "last window")


def _sweep_cells(row: Row) -> list[str]:
    saved = [share(row["saved_tokens_generated"]), share(row["saved_cpu_s"])]
    accuracy = with_error(row["accuracy"], row["accuracy_stderr"])
    return [f"{row['value']:g}", accuracy, *saved, f"{fmean(row['final_horizons']):.0f}"]


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [f"<tr>{''.join(f'<th>{escape(name)}</th>' for name in head)}</tr>"]
    lines += [f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows]
    return f'<div class="wide"><table class="compare">{"".join(lines)}</table></div>'
