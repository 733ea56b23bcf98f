"""The report: one HTML page that needs nothing else (no network, no script), and an overview PNG beside it."""

from __future__ import annotations

import base64
from html import escape
from pathlib import Path

from prune_opd.errors import UserError
from prune_opd.track.console import duration, summary_rows
from prune_opd.track.plotting import PHASE_COLOURS, Chart, overview_png, png
from prune_opd.track.report_compare import comparison_charts
from prune_opd.track.report_data import RunData, load_runs
from prune_opd.track.report_plots import run_charts

_OVERVIEW_CHARTS = 8


def write_report(run_dirs: list[Path], out: Path) -> None:
    """Writes the report of one run, or of several compared, to `out`, and its overview to `out` with the suffix .png.

    A run needs a metrics.jsonl with one record; whatever else it lacks (evaluations, config.yaml, single metrics) is
    left out of its page.

    Raises:
        UserError: no run directory is given, or one has no usable metrics.jsonl.
    """
    if not run_dirs:
        raise UserError("no run directory is given: name at least one")
    runs = load_runs(list(dict.fromkeys(path.resolve() for path in run_dirs)))
    charts = {run.name: run_charts(run) for run in runs}
    compared = comparison_charts(runs) if len(runs) > 1 else []
    title = f"{runs[0].name}: Prune-OPD run" if len(runs) == 1 else f"Comparison of {len(runs)} Prune-OPD runs"
    body = [f"<header><h1>{escape(title)}</h1>{_subtitle(runs)}</header>"]
    if compared:
        body += [_comparison_table(runs), grid(compared)]
        body += [f"<h2>{escape(run.name)}</h2>{_tiles(run)}{_details(run, charts[run.name])}" for run in runs]
    else:
        body += [_tiles(runs[0]), _facts(runs[0]), _details(runs[0], charts[runs[0].name])]
    write_page(title, body, out)
    facts = "   ·   ".join(f"{name}: {value}" for name, value in _headlines(runs[0], tasks=2))
    subtitle = facts if len(runs) == 1 else "   ·   ".join(run.name for run in runs)
    shown = (compared or charts[runs[0].name])[:_OVERVIEW_CHARTS]
    out.with_suffix(".png").write_bytes(overview_png(title, subtitle, shown))


def write_page(title: str, body: list[str], out: Path) -> None:
    """A page of ours from its parts in HTML."""
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(_PAGE.format(title=escape(title), style=_STYLE, body="\n".join(body)), encoding="utf-8")


# -------------------------------------------------------------------------------------------------------- sections


def _subtitle(runs: list[RunData]) -> str:
    return "<p>" + "<br>".join(escape(str(run.run_dir)) for run in runs) + "</p>"


def _headlines(run: RunData, tasks: int | None = None) -> list[tuple[str, str]]:
    """The few figures that a reader looks for first."""
    summary = run.summary
    rows = []
    for accuracy in summary.accuracy[:tasks]:
        after = "" if accuracy.after is None else f" → {accuracy.after:.1%}"
        rows.append((f"accuracy, {accuracy.task}", f"{accuracy.before:.1%}{after}"))
    if summary.saved is not None:
        rows.append(("tokens saved (est.)", f"{summary.saved:.1%}"))
    overlap = [r["overlap"] for r in run.steps if r.get("overlap") is not None]
    if overlap:
        rows.append(("mean overlap", f"{overlap[0]:.2f} → {overlap[-1]:.2f}"))
    horizon = [r["horizon"] for r in run.steps if r.get("horizon") is not None]
    if horizon:
        rows.append(("horizon, tokens", f"{horizon[0]:,} → {horizon[-1]:,}"))
    rows.append(("time", duration(summary.seconds)))
    return rows


def _tiles(run: RunData) -> str:
    tiles = "".join(
        f'<div class="tile"><b>{escape(value)}</b><span>{escape(name)}</span></div>' for name, value in _headlines(run)
    )
    return f'<div class="tiles">{tiles}</div>'


def _facts(run: RunData) -> str:
    """The totals in two tables side by side: what came out, and where the time went."""
    rows = [("run", run.name), ("steps", f"{run.summary.steps:,}"), *summary_rows(run.summary)]
    split = next(i for i, (name, _) in enumerate(rows) if name == "time")
    tables = (
        "".join(f"<tr><th>{_indented(name)}</th><td>{escape(value)}</td></tr>" for name, value in part)
        for part in (rows[:split], rows[split:])
    )
    return '<div class="pair">' + "".join(f"<table>{cells}</table>" for cells in tables) + "</div>"


def _details(run: RunData, charts: list[Chart]) -> str:
    note = "" if run.tasks else '<p class="note">This run has no evaluation, so nothing here shows success.</p>'
    return f"{note}{_configuration(run)}{grid(charts)}"


def _configuration(run: RunData) -> str:
    if run.config_text is None:
        return '<p class="note">The run directory has no config.yaml.</p>'
    return f"<details><summary>Configuration (config.yaml)</summary><pre>{escape(run.config_text)}</pre></details>"


def _comparison_table(runs: list[RunData]) -> str:
    """One column a run, one row a figure: names and values are those of the single reports."""
    columns = [dict([("steps", f"{run.summary.steps:,}"), *summary_rows(run.summary)]) for run in runs]
    # The rows of a run are in a fixed order; what only a later run has must still stand in its place.
    names = sorted(dict.fromkeys(name for column in columns for name in column), key=_row_rank)
    head = "".join(f"<th>{escape(run.name)}</th>" for run in runs)
    rows = "".join(
        f"<tr><th>{_indented(name)}</th>"
        + "".join(f"<td>{escape(column.get(name, '–'))}</td>" for column in columns)
        + "</tr>"
        for name in names
    )
    return f'<div class="wide"><table class="compare"><tr><th></th>{head}</tr>{rows}</table></div>'


def _row_rank(name: str) -> int:
    """Where a summary row stands: steps, accuracies, tokens, padding, horizon, time, phases."""
    starts = (
        "steps",
        "accuracy",
        "tokens generated",
        "tokens at",
        "tokens saved",
        "tokens stopped",
        "tokens the",
        "padding",
        "final",
        "time",
    )
    phases = [f"  {label}" for label in PHASE_COLOURS]
    order = [*starts, *phases]
    return next((i for i, start in enumerate(order) if name.startswith(start)), len(order))


def grid(charts: list[Chart]) -> str:
    return '<div class="grid">' + "".join(_card(chart) for chart in charts) + "</div>"


def _card(chart: Chart) -> str:
    image = base64.b64encode(png(chart)).decode("ascii")
    return (
        f"<figure><h3>{escape(chart.title)}</h3>"
        f'<img alt="{escape(chart.title)}" src="data:image/png;base64,{image}">'
        f"<figcaption>{escape(chart.caption)}</figcaption></figure>"
    )


def _indented(name: str) -> str:
    """Leading blanks mark a part of the row above."""
    return ("&emsp;" if name.startswith("  ") else "") + escape(name.strip())


_STYLE = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1240px; padding: 28px 24px 48px; background: #f5f7f9; color: #1f2933;
       font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", "DejaVu Sans", sans-serif; }
h1 { margin: 0; font-size: 26px; font-weight: 650; letter-spacing: -0.01em; overflow-wrap: anywhere; }
h2 { margin: 44px 0 12px; padding-top: 20px; border-top: 1px solid #d5dbe1; font-size: 20px; overflow-wrap: anywhere; }
h3 { margin: 0 0 8px; font-size: 15px; font-weight: 600; }
header { margin-bottom: 20px; }
header p { margin: 4px 0 0; color: #5f6b7a; overflow-wrap: anywhere;
           font: 12.5px/1.5 ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace; }
.tiles { display: flex; flex-wrap: wrap; gap: 12px; margin-bottom: 16px; }
.tile { flex: 1 1 150px; padding: 12px 16px; background: #fff; border: 1px solid #e1e6eb; border-radius: 8px; }
.tile b { display: block; font-size: 20px; font-weight: 650; white-space: nowrap; font-variant-numeric: tabular-nums; }
.tile span { color: #5f6b7a; font-size: 12.5px; }
table { width: 100%; border-collapse: separate; border-spacing: 0; background: #fff; font-size: 13.5px;
        border: 1px solid #e1e6eb; border-radius: 8px; font-variant-numeric: tabular-nums; }
th, td { padding: 5px 14px; text-align: left; vertical-align: top; border-bottom: 1px solid #eef1f4; }
tr:last-child > * { border-bottom: 0; }
th { font-weight: 500; color: #5f6b7a; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(460px, 1fr)); gap: 16px; align-items: start; }
.pair th { width: 215px; }
.compare tr:first-child th { color: #1f2933; font-weight: 650; border-bottom: 2px solid #d5dbe1; }
.wide { overflow-x: auto; }
details { margin-top: 12px; padding: 10px 16px; background: #fff; border: 1px solid #e1e6eb; border-radius: 8px; }
summary { cursor: pointer; font-weight: 550; }
pre { margin: 10px 0 2px; overflow-x: auto;
      font: 12.5px/1.45 ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace; }
.note { padding: 10px 16px; background: #fff8e6; border: 1px solid #f0dfae; border-radius: 8px; }
.grid { display: grid; grid-template-columns: repeat(auto-fit, minmax(460px, 1fr)); gap: 16px; margin-top: 16px; }
figure { margin: 0; padding: 16px 18px; background: #fff; border: 1px solid #e1e6eb; border-radius: 8px; }
figure img { display: block; width: 100%; height: auto; }
figcaption { margin-top: 8px; color: #5f6b7a; font-size: 13px; }
@media (max-width: 560px) { .grid, .pair { grid-template-columns: 1fr; } }
@media print { body { background: #fff; } figure { break-inside: avoid; } }
"""

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
{body}
</body>
</html>
"""
