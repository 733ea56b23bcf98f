"""The report's table of speed: each phase as it was, beside what the plan says of it."""

from __future__ import annotations

from html import escape

from prune_opd.track.metrics import Record, total

PHASES = ("rollout", "teacher", "train", "step")
HEAD = ("phase", "s a step", "planned s", "tokens/s of each rank", "FLOP/s of each rank", "MFU", "planned MFU")
ABSENT = "–"


def speed_rows(steps: list[Record]) -> list[list[str]]:
    """A row a phase, in the columns of `HEAD`: means over the run's seconds. Empty for a run that has no speeds."""
    known = [step for step in steps if step.get("flops_step") is not None]
    return [_row(known, phase) for phase in PHASES] if known else []


def speed_table(steps: list[Record]) -> str:
    """The rows as HTML; empty if there are none."""
    rows = speed_rows(steps)
    if not rows:
        return ""
    head = "".join(f"<th>{escape(name)}</th>" for name in HEAD)
    body = "".join(
        f"<tr><th>{escape(name)}</th>" + "".join(f"<td>{escape(text)}</td>" for text in cells) + "</tr>"
        for name, *cells in rows
    )
    return f'<div class="wide"><table class="compare"><tr>{head}</tr>{body}</table></div>'


def _row(steps: list[Record], phase: str) -> list[str]:
    seconds, planned = f"time_{phase}", f"planned_time_{phase}"
    time = total(steps, seconds)
    return [
        phase,
        f"{time / len(steps):.3g}",
        f"{total(steps, planned) / len(steps):.3g}" if all(planned in step for step in steps) else ABSENT,
        _mean(steps, f"speed_{phase}", seconds, "{:,.0f}"),
        _mean(steps, f"flops_{phase}", seconds, "{:.3g}"),
        _mean(steps, f"mfu_{phase}", seconds, "{:.1%}"),
        _mean(steps, f"planned_mfu_{phase}", planned, "{:.1%}"),
    ]


def _mean(steps: list[Record], key: str, seconds: str, form: str) -> str:
    """The mean of a rate over the seconds that it was measured in."""
    known = [step for step in steps if step.get(key) is not None and step.get(seconds)]
    if not known:
        return ABSENT
    return form.format(sum(step[key] * step[seconds] for step in known) / total(known, seconds))
