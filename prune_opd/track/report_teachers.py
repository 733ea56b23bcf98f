"""The chart of several teachers: window, overlap, events and KL of each, one below the other."""

from __future__ import annotations

from typing import Any

from prune_opd.track.metrics import teacher_names
from prune_opd.track.plotting import CYCLE, count_axis, from_zero, legend, percent_axis, trend
from prune_opd.track.report_data import RunData

PANELS = {"horizon": "horizon", "overlap": "overlap", "event_rate": "events", "reverse_kl": "reverse KL"}


def teachers_of(run: RunData) -> tuple[str, ...]:
    """The names of a run's teachers; empty for a run with one."""
    return teacher_names(frozenset(run.steps[0])) if run.steps else ()


def by_teacher(fig: Any, run: RunData) -> None:
    """A panel a metric, a line a teacher."""
    x, panels = run.step_numbers(), fig.subplots(len(PANELS), 1, sharex=True)
    for ax, (key, label) in zip(panels, PANELS.items(), strict=True):
        for name, colour in zip(teachers_of(run), CYCLE * 2, strict=False):
            trend(ax, x, run.series(f"{key}_of_{name}"), color=colour, label=name)
        ax.set_ylabel(label)
        if key != "overlap":
            from_zero(ax)
    percent_axis(panels[2].yaxis)
    panels[-1].set_xlabel("step")
    count_axis(panels[-1].xaxis)
    legend(panels[0], ncols=4)
