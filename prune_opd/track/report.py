"""The report: one HTML page that needs nothing else (no network), and beside it an overview and every chart as PNG."""

from __future__ import annotations

from html import escape
from pathlib import Path

from prune_opd.errors import UserError
from prune_opd.track.console import duration, summary_rows, unreadable_notes
from prune_opd.track.plotting import PHASE_COLOURS, overview_png
from prune_opd.track.redact import redact
from prune_opd.track.report_compare import ABSENT, comparison_charts, different_settings
from prune_opd.track.report_data import RunData, load_runs
from prune_opd.track.report_page import grid as grid
from prune_opd.track.report_page import write_page as write_page
from prune_opd.track.report_plots import run_charts
from prune_opd.track.report_speed import speed_table
from prune_opd.track.report_viewer import viewer

_OVERVIEW_CHARTS = 8
_CUT = 60  # characters of a setting's value


def write_report(run_dirs: list[Path], out: Path) -> list[str]:
    """Writes the report of one run, or of several compared, to `out`.

    Its overview goes to `out` with the suffix .png, its charts one by one into a folder named like `out` without one.

    A run needs a metrics.jsonl with one record; whatever else it lacks (evaluations, config.yaml, single metrics) is
    left out of its page. Returns what is wrong with the runs' files; their pages say it too.

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
    folder = out.with_suffix("")
    for old in folder.glob("[0-9][0-9]-*.png"):
        old.unlink()
    if compared:
        body += [_settings_table(runs), _comparison_table(runs), grid(compared, folder), viewer(runs)]
        body += [f"<h2>{escape(run.name)}</h2>{_tiles(run)}{_details(run, grid(charts[run.name]))}" for run in runs]
    else:
        body += [_tiles(runs[0]), _facts(runs[0]), _details(runs[0], grid(charts[runs[0].name], folder)), viewer(runs)]
    write_page(title, body, out)
    facts = "   ·   ".join(f"{name}: {value}" for name, value in _headlines(runs[0], tasks=2))
    subtitle = facts if len(runs) == 1 else "   ·   ".join(run.name for run in runs)
    shown = (compared or charts[runs[0].name])[:_OVERVIEW_CHARTS]
    out.with_suffix(".png").write_bytes(overview_png(title, subtitle, shown))
    return [doubt for run in runs for doubt in run.doubts]


# -------------------------------------------------------------------------------------------------------- sections


def _subtitle(runs: list[RunData]) -> str:
    link = '<br><a href="#viewer">to the rollout viewer</a>' if any(run.samples for run in runs) else ""
    return "<p>" + "<br>".join(escape(redact(str(run.run_dir))) for run in runs) + link + "</p>"


def _headlines(run: RunData, tasks: int | None = None) -> list[tuple[str, str]]:
    """The few figures that a reader looks for first."""
    summary = run.summary
    rows = []
    for accuracy in summary.accuracy[:tasks]:
        after = "" if accuracy.after is None else f" → {accuracy.after:.1%}"
        rows.append((f"accuracy, {accuracy.task}", f"{accuracy.before:.1%}{after}"))
    if summary.saved is not None:
        rows.append(("tokens saved (est.)", f"{summary.saved:.1%}"))
    if summary.full_kl is not None:
        rows.append(("full reverse KL", "{:.3g} → {:.3g}".format(*summary.full_kl)))
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


def _details(run: RunData, charts: str) -> str:
    notes = [f"{doubt}." for doubt in run.doubts]
    notes += [] if run.tasks else ["This run has no evaluation, so nothing here shows success."]
    for accuracy in run.summary.accuracy:
        notes += unreadable_notes(accuracy.task, accuracy.readable_after or accuracy.readable_before)
    warned = [step for step in run.steps if step.get("warning")]
    notes += [f"Warning, last at step {step['step']}: {step['warning']}." for step in warned[-1:]]
    note = "".join(f'<p class="note">{escape(sentence)}</p>' for sentence in notes)
    config = '<p class="note">The run directory has no config.yaml.</p>'
    if run.config_text is not None:
        text = escape(run.config_text)
        config = f"<details><summary>Configuration (config.yaml)</summary><pre>{text}</pre></details>"
    return note + speed_table(run.steps) + config + charts


def _comparison_table(runs: list[RunData]) -> str:
    """One column a run, one row a figure: names and values are those of the single reports."""
    columns = [dict([("steps", f"{run.summary.steps:,}"), *summary_rows(run.summary)]) for run in runs]
    # The rows of a run have a fixed order; a row that only a later run has must keep its place in it.
    names = sorted(dict.fromkeys(name for column in columns for name in column), key=_row_rank)
    return _side_by_side(runs, "", {name: [column.get(name, ABSENT) for column in columns] for name in names})


def _settings_table(runs: list[RunData]) -> str:
    """What the runs were told, where that differs: a difference in figures has its reason there, or in chance."""
    rows = {
        key: [text if len(text) <= _CUT else f"{text[: _CUT - 1]}…" for text in values]
        for key, values in different_settings(runs).items()
    }
    if not rows:
        return '<p class="note">No setting of these runs is known to differ.</p>'
    return _side_by_side(runs, "settings that differ", rows)


def _side_by_side(runs: list[RunData], title: str, rows: dict[str, list[str]]) -> str:
    """One column a run. rows: by name, with a value for each run."""
    head = "".join(f"<th>{escape(name)}</th>" for name in (title, *(run.name for run in runs)))
    body = "".join(
        f"<tr><th>{_indented(name)}</th>" + "".join(f"<td>{escape(value)}</td>" for value in values) + "</tr>"
        for name, values in rows.items()
    )
    return f'<div class="wide"><table class="compare"><tr>{head}</tr>{body}</table></div>'


def _row_rank(name: str) -> int:
    """Where a summary row stands: steps, accuracies, answers, tokens, padding, horizon, time, phases."""
    starts = (
        "steps",
        "accuracy",
        "answers readable",
        "full reverse KL",
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


def _indented(name: str) -> str:
    """Leading blanks mark a part of the row above."""
    return ("&emsp;" if name.startswith("  ") else "") + escape(name.strip())
