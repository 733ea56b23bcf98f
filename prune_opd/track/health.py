"""Whether a run's numbers hang together: what its objective reports against what the whole vocabulary says.

A truncated objective can bring its own divergence to nothing while the student gets no nearer to its teacher
(method.md §7). The first steps of a run are held against the latest ones, three of each:

    blind    the objective's divergence has fallen by 30 % or more, and the full reverse KL by less than half as much
    leak     the student's best ids have lost .05 of its mass or more, and its entropy has risen and is a tenth above
             the teacher's on the same text
    worse    the full reverse KL at the positions that both have reached has risen by 20 % or more

And every step of the rollout engine that is farthest from the trainer (mean |Δ|, method/mismatch.py):

    mismatch  it is above half of what ends the run in this format, or three times the median of the ten steps before
              and no longer small (a hundredth of that limit): a layer that is stale or broken does that at once
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import median

from prune_opd.track.metrics import Record, full_kl

WINDOW = 3  # steps
FALL, FOLLOWS = 0.3, 0.5
LOST_MASS, ABOVE_TEACHER = 0.05, 1.1
RISE = 1.2
NEAR, JUMP, SMALL, BEFORE = 0.5, 3.0, 0.01, 10


def warnings(steps: Sequence[Record], limit: float = math.inf) -> dict[str, str]:
    """What is wrong with a run that has taken these steps: kind → sentence.

    Of fewer than six steps only the mismatch is judged. limit: mean |Δ| that ends a run in its format [nats].
    """
    found = {"mismatch": _mismatch(steps, limit), **_course(steps)}
    return {kind: text for kind, text in found.items() if text}


def _mismatch(steps: Sequence[Record], limit: float) -> str | None:
    farthest = [max(known) for step in steps[-BEFORE - 1 :] if (known := _of_engines(step))]
    if not steps or not (now := _of_engines(steps[-1])):
        return None
    before, worst = farthest[:-1], max(now)
    jumped = bool(before) and worst > JUMP * median(before) and worst > SMALL * limit
    if worst <= NEAR * limit and not jumped:
        return None
    usual = f", {median(before):.2g} in the steps before" if before else ""
    return (
        f"rollout engine {now.index(worst)} and the trainer differ by {worst:.2g} nats on average in the "
        f"log-probability of a sampled token{usual}: look whether the engine has all of the student's weights "
        "(rollout.parity_every=1)"
    )


def _of_engines(step: Record) -> list[float]:
    return [mean or 0.0 for mean in step.get("mismatch_mean_by_engine") or []]


def _course(steps: Sequence[Record]) -> dict[str, str | None]:
    known = [step for step in steps if full_kl(step) is not None and step.get("divergence") is not None]
    if len(known) < 2 * WINDOW:
        return {}
    windows = known[:WINDOW], known[-WINDOW:]
    return {"blind": _blind(*windows), "leak": _leak(*windows), "worse": _worse(*windows)}


def _blind(first: Sequence[Record], last: Sequence[Record]) -> str | None:
    if all(step["divergence"] == step.get("reverse_kl_sampled") for step in last):
        return None  # the objective is that estimate, and differs from the exact KL by noise alone
    divergence, kl = (_fall([key(step) for step in first], [key(step) for step in last]) for key in (_divergence, _kl))
    if divergence < FALL or kl >= FOLLOWS * divergence:
        return None
    return (
        f"the objective's divergence fell by {divergence:.0%} and the full reverse KL by {kl:.0%}: the student learns "
        "what the objective looks at, not its teacher; take objective.name=full_vocab_reverse_kl or "
        "objective.tail=bucket"
    )


def _leak(first: Sequence[Record], last: Sequence[Record]) -> str | None:
    (mass, entropy, _), (mass_now, entropy_now, teacher) = (
        [_mean([step[key] for step in window]) for key in ("support_mass", "student_entropy", "teacher_entropy")]
        if all(step.get("teacher_entropy") is not None for step in window)
        else [0.0, 0.0, 0.0]
        for window in (first, last)
    )
    if mass - mass_now < LOST_MASS or entropy_now <= entropy or entropy_now <= ABOVE_TEACHER * teacher:
        return None
    return (
        f"mass leaves the student's best ids ({mass:.2f} → {mass_now:.2f}) and its entropy rises "
        f"({entropy:.2f} → {entropy_now:.2f}, the teacher's is {teacher:.2f}): lower optimizer.lr, or take an "
        "objective on the whole vocabulary"
    )


def _worse(first: Sequence[Record], last: Sequence[Record]) -> str | None:
    """At equal positions: a window that opens brings later ones, where the KL is another."""
    before, after = (_curve(window) for window in (first, last))
    both = [(was, now) for was, now in zip(before, after, strict=False) if was is not None and now is not None]
    was, now = (_mean(values) for values in zip(*both, strict=True)) if both else (0.0, 0.0)
    if was <= 0 or now < RISE * was:
        return None
    return (
        f"the full reverse KL rose from {was:.3g} to {now:.3g} at the same positions: the student moves away from its "
        "teacher; lower optimizer.lr"
    )


def _curve(window: Sequence[Record]) -> list[float | None]:
    bins = zip(*(step.get("reverse_kl_by_position") or [] for step in window), strict=False)
    return [
        _mean([value for value in values if value is not None] or [0.0]) if any(values) else None for values in bins
    ]


def _divergence(step: Record) -> float:
    return float(step["divergence"])


def _kl(step: Record) -> float:
    kl = full_kl(step)
    assert kl is not None
    return kl


def _fall(first: Sequence[float], last: Sequence[float]) -> float:
    """By which share of itself it fell; 0 where it was not above 0."""
    was = _mean(first)
    return 1 - _mean(last) / was if was > 0 else 0.0


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
