"""A run's totals, for the console and the report."""

from __future__ import annotations

from dataclasses import dataclass

from prune_opd.track.metrics import (
    EVAL_PREFIX,
    PHASES,
    STDERR_SUFFIX,
    Record,
    full_kl,
    readable,
    task_names,
    teacher_names,
    total,
)


@dataclass(frozen=True)
class Accuracy:
    """First and last accuracy of a task (0..1) and the steps they were taken at; one alone has no `after`."""

    task: str
    first_step: int
    before: float
    before_stderr: float | None
    last_step: int
    after: float | None
    after_stderr: float | None
    readable_before: tuple[int, int] | None = None  # answers that could be read, all answers
    readable_after: tuple[int, int] | None = None


@dataclass(frozen=True)
class OfTeacher:
    """Totals of one of several teachers. overlap: of the first step and of the last in which it had a response."""

    name: str
    final_horizon: int
    tokens: int
    overlap: tuple[float, float] | None


@dataclass(frozen=True)
class Summary:
    """A run's totals. Lengths in tokens, times in seconds; None where the run did not measure it."""

    steps: int
    final_horizon: int | None
    accuracy: list[Accuracy]
    tokens_generated: int
    tokens_full: int | None  # estimate, over the steps that have one
    saved: float | None  # 1 - generated / full over those steps: an estimate, below zero if nothing was saved
    stopped: int  # responses that the in-flight gate stopped
    tokens_avoided: int  # estimate: what those would still have cost
    teacher_tokens_inflight: int
    full_kl: tuple[float, float] | None  # reverse KL over the vocabulary, of the first step and of the last
    padding: tuple[float, float] | None  # mean share of padding: rows padded to the longest, and packed
    seconds: float
    phases: dict[str, float]  # label -> seconds: the phases, other, evaluation; those that took no time are left out
    teachers: tuple[OfTeacher, ...] = ()  # of several


def summarise(steps: list[Record], evaluations: list[Record]) -> Summary:
    """Adds a run up. Either list may be empty."""
    estimated = [r for r in steps if r.get("tokens_full")]
    full = sum(r["tokens_full"] for r in estimated)
    kls = [kl for kl in map(full_kl, steps) if kl is not None]
    phases = {label: total(steps, key) for key, label in PHASES.items()}
    phases["other"] = max(0.0, total(steps, "time_step") - sum(phases.values()))
    phases["evaluation"] = total(evaluations, "time_eval")
    return Summary(
        steps=max((r["step"] for r in steps), default=0),
        final_horizon=next((r["horizon"] for r in reversed(steps) if r.get("horizon") is not None), None),
        accuracy=_accuracies(evaluations),
        tokens_generated=int(total(steps, "tokens_generated")),
        tokens_full=round(full) if estimated else None,
        saved=1 - total(estimated, "tokens_generated") / full if estimated else None,
        stopped=int(total(steps, "pruned_inflight")),
        tokens_avoided=round(total(steps, "tokens_avoided")),
        teacher_tokens_inflight=int(total(steps, "teacher_tokens_inflight")),
        full_kl=(kls[0], kls[-1]) if kls else None,
        padding=_padding(steps),
        seconds=sum(phases.values()),
        phases={label: seconds for label, seconds in phases.items() if seconds > 0},
        teachers=tuple(
            _of_teacher(steps, name) for name in teacher_names(frozenset(steps[-1]) if steps else frozenset())
        ),
    )


def _of_teacher(steps: list[Record], name: str) -> OfTeacher:
    overlaps = [step[f"overlap_of_{name}"] for step in steps if step.get(f"overlap_of_{name}") is not None]
    return OfTeacher(
        name,
        final_horizon=steps[-1][f"horizon_of_{name}"],
        tokens=int(total(steps, f"tokens_of_{name}")),
        overlap=(overlaps[0], overlaps[-1]) if overlaps else None,
    )


def _padding(steps: list[Record]) -> tuple[float, float] | None:
    keys = ("padding_waste_padded", "padding_waste_packed")
    known = [r for r in steps if all(r.get(key) is not None for key in keys)]
    if not known:
        return None
    padded, packed = (total(known, key) / len(known) for key in keys)
    return padded, packed


def _accuracies(evaluations: list[Record]) -> list[Accuracy]:
    found = []
    for task in dict.fromkeys(name for line in evaluations for name in task_names(line)):
        key = EVAL_PREFIX + task
        lines = [line for line in evaluations if line.get(key) is not None]
        if not lines:
            continue
        first, last = lines[0], lines[-1]
        again = last if len(lines) > 1 else {}
        found.append(
            Accuracy(
                task=task,
                first_step=first["step"],
                before=first[key],
                before_stderr=first.get(key + STDERR_SUFFIX),
                last_step=last["step"],
                after=again.get(key),
                after_stderr=again.get(key + STDERR_SUFFIX),
                readable_before=readable(first, f"{key}_"),
                readable_after=readable(again, f"{key}_"),
            )
        )
    return found
