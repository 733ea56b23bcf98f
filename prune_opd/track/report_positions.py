"""The charts over positions in the response: maps of step × position, and curves of early, middle and late steps."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import numpy as np
from matplotlib.colors import LinearSegmentedColormap, to_rgb
from matplotlib.ticker import MaxNLocator

from prune_opd.track.plotting import BLUE, INK, MUTED, axes, count_axis, legend, percent_axis
from prune_opd.track.report_data import RunData

_STEPS = 10  # steps that are averaged into one curve, at most
_SHARES = LinearSegmentedColormap.from_list("shares", [(*to_rgb(BLUE), alpha) for alpha in (0, 0.35, 1)])  # over paper
_COLOURS = ("#9ecae1", "#3a8fc4", "#08306b")  # early, middle, late


def overlap_map(fig: Any, run: RunData) -> None:
    """Mean overlap, step × position, with the horizon."""
    values = np.array(run.by_position("overlap_by_position"))
    low, high = _round_out(values)
    _map(fig, run, values, "position", "mean overlap", cmap="viridis", vmin=low, vmax=high)


def length_map(fig: Any, run: RunData) -> None:
    """Share of the responses that end in each stretch, step × length, with the horizon."""
    bar = _map(fig, run, _length_shares(run), "response length", "share of the responses", cmap=_SHARES, vmin=0)
    percent_axis(bar.ax.yaxis)


def profile(fig: Any, run: RunData, key: str, ylabel: str, *, from_zero: bool = False) -> None:
    """A by-position metric of the first, middle and last steps."""
    ax = axes(fig, _label(run, "position"), ylabel)
    values = np.array(run.by_position(key))  # steps, bins
    centres = (np.arange(values.shape[1]) + 0.5) / values.shape[1] * (run.max_len or 1)
    for label, colour, curve in _early_middle_late(run, values):
        ax.plot(centres, curve, color=colour, marker="o", linewidth=2, label=label)
    if from_zero:
        ax.set_ylim(0, max(1.05, 1.05 * np.nanmax(values)))
    _finish(ax, run)


def length_profile(fig: Any, run: RunData) -> None:
    """The distribution of response lengths in the first, middle and last steps."""
    ax = axes(fig, _label(run, "response length"), "share of the responses")
    values = _length_shares(run)
    edges = np.linspace(0, run.max_len or 1, values.shape[1] + 1)
    for label, colour, curve in _early_middle_late(run, values):
        ax.stairs(np.nan_to_num(curve), edges, color=colour, linewidth=2, label=label)
    ax.set_ylim(bottom=0)
    percent_axis(ax.yaxis)
    _finish(ax, run)


def _map(fig: Any, run: RunData, values: Any, what: str, bar_label: str, **colours: Any) -> Any:
    """values: steps, bins. Returns the colour bar."""
    ax = axes(fig, "step", _label(run, what))
    ax.grid(False)
    top, x, used = float(run.max_len or 1), run.step_numbers(), np.flatnonzero((np.nan_to_num(values) > 0).any(axis=0))
    y_edges = np.linspace(0, top, values.shape[1] + 1)
    x_edges = [x[0] - 0.5, *((a + b) / 2 for a, b in pairwise(x)), x[-1] + 0.5]
    mesh = ax.pcolormesh(x_edges, y_edges, values.T, rasterized=True, **colours)
    ax.set_ylim(0, y_edges[min(len(y_edges) - 1, used[-1] + 1)] if used.size else top)
    if run.max_len and run.has("horizon"):
        ax.step(x, run.series("horizon"), where="mid", color="white", linewidth=3.2)
        ax.step(x, run.series("horizon"), where="mid", color=INK, linewidth=1.4, label="horizon M")
        legend(ax)
    count_axis(ax.xaxis)
    bar = fig.colorbar(mesh, ax=ax, pad=0.02, aspect=28, ticks=MaxNLocator(6, steps=[1, 2, 5, 10]))
    bar.outline.set_visible(False)
    bar.set_label(bar_label, color=MUTED)
    return bar


def _early_middle_late(run: RunData, values: Any) -> list[tuple[str, str, Any]]:
    """Label, colour and mean curve [bins] of the first, middle and last steps of values [steps, bins]."""
    width = min(_STEPS, max(1, len(values) // 10))
    starts = sorted({0, (len(values) - width) // 2, len(values) - width})
    steps, found = run.step_numbers(), []
    for start, colour in zip(starts, _COLOURS[-len(starts) :], strict=True):
        chosen = values[start : start + width]
        present = ~np.isnan(chosen).all(axis=0)
        curve = np.full(values.shape[1], math.nan)
        curve[present] = np.nanmean(chosen[:, present], axis=0)
        first, last = steps[start], steps[start + width - 1]
        found.append((f"step {first}" if first == last else f"steps {first}–{last}", colour, curve))
    return found


def _length_shares(run: RunData) -> Any:
    """Share of a step's responses that end in each bin [steps, bins]; NaN for a step without lengths."""
    counts = np.array(run.by_position("lengths_by_position"))
    totals = np.nansum(counts, axis=1, keepdims=True)
    return counts / np.where(totals > 0, totals, math.nan)


def _label(run: RunData, what: str) -> str:
    return f"{what} [tokens]" if run.max_len else f"{what} [share of the full horizon]"


def _finish(ax: Any, run: RunData) -> None:
    ax.set_xlim(left=0)
    if run.max_len:
        count_axis(ax.xaxis)
    legend(ax)


def _round_out(values: Any) -> tuple[float, float]:
    """The range of the values, widened to twentieths."""
    if np.isnan(values).all():
        return 0.0, 1.0
    low, high = math.floor(np.nanmin(values) * 20) / 20, math.ceil(np.nanmax(values) * 20) / 20
    return (low, high) if low < high else (low, low + 0.05)
