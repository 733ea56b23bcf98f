"""The work of each phase of a step, counted, and how fast a measurement grows beside it.

The count is of multiplications and additions in matrix products and attention, and of bytes for the weight sync. It is
used only for how it grows, so constant factors of a whole phase do not matter; that of attention against the products
does.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import linear_regression

from prune_opd.model_spec import ModelSpec
from prune_opd.plan.counts import flops_by_length, parameters

PHASES = ("sync", "rollout", "teacher", "train")
AXES = {"length": "response length", "batch": "batch", "parameters": "parameters", "ranks": "ranks"}
SLACK = 0.2  # by which a measured slope may be above that of the work: noise, and caches that no longer hold


def work(spec: ModelSpec, rows: int, prompt: float, response: float, ranks: int) -> dict[str, float]:
    """The work of each phase, all ranks together: `rows` responses of `response` tokens each after prompts of `prompt`.

    The weights go whole to every rank's engine.
    """
    forward = rows * flops_by_length(spec, head=False)(prompt + response)
    sampled = rows * response * 2 * spec.vocab_size * spec.hidden
    return {
        "sync": ranks * parameters(spec),
        "rollout": forward + sampled,
        "teacher": forward,
        "train": 3 * forward + 4 * sampled,  # the loss: the student's logits, their two gradients, the teacher's logits
    }


def slope(x: Sequence[float], y: Sequence[float]) -> float:
    """The slope of log y over log x: 1 is linear, 2 quadratic."""
    return linear_regression([math.log(value) for value in x], [math.log(value) for value in y]).slope


@dataclass(frozen=True)
class Growth:
    """How something grows along an axis, by all points and by the last two, which constant costs hide least from."""

    axis: str
    what: str
    slope: float
    last: float
    work_slope: float
    work_last: float

    @property
    def too_fast(self) -> bool:
        return self.slope > self.work_slope + SLACK or self.last > self.work_last + SLACK

    def __str__(self) -> str:
        return f"{self.slope:.2f} ({self.last:.2f})"

    @property
    def expectation(self) -> str:
        return f"{self.work_slope:.2f} ({self.work_last:.2f})"


def growth(axis: str, what: str, x: Sequence[float], y: Sequence[float], expected: Sequence[float]) -> Growth:
    """x ascending; expected: the work at each x."""
    return Growth(axis, what, slope(x, y), slope(x[-2:], y[-2:]), slope(x, expected), slope(x[-2:], expected[-2:]))
