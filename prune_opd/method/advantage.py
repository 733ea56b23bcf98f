"""Advantages of whole responses from a task's rewards (GRPO's, DeepSeekMath, arXiv 2402.03300 §4.1; RLOO's kin).

    group     A_i = (r_i − mean) / std over the scored responses of a prompt
    batch     the same over all scored responses of a step
    none      A_i = r_i

std is that of a sample (n − 1). Where all rewards are alike, or only one is there, nothing can be learnt: A = 0. A
response without a reward has A = 0 and no part in mean and std. Every token of a response has its response's advantage,
and adds

    −coef · min(ρ_t A_i, clip(ρ_t, 1 ± ε) A_i),   ρ_t = p(y_t) / p_old(y_t),

to the gated loss, in the same global token mean (so long responses count more, as in DAPO, arXiv 2503.14476; GRPO's own
mean is by response). The gate does not weigh it: how far the teacher can be trusted says nothing about a reward.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Literal

EQUAL = 1e-8  # a standard deviation below this is rounding: all rewards are alike


def advantages(
    rewards: Sequence[float | None], responses: int, normalise: Literal["group", "batch", "none"]
) -> list[float]:
    """A_i of every response. rewards: by row, `responses` rows a prompt, prompt after prompt; None: no reward."""
    if normalise == "none":
        return [0.0 if reward is None else reward for reward in rewards]
    size = responses if normalise == "group" else max(len(rewards), 1)
    return [value for first in range(0, len(rewards), size) for value in _normalised(rewards[first : first + size])]


def equal_groups(rewards: Sequence[float | None], responses: int) -> float | None:
    """Share of the prompts whose rewards are all alike, among those with two or more; None if there are none."""
    groups = [_known(rewards[first : first + responses]) for first in range(0, len(rewards), responses)]
    equal = [_deviation(group) <= EQUAL for group in groups if len(group) > 1]
    return statistics.fmean(equal) if equal else None


def _normalised(rewards: Sequence[float | None]) -> list[float]:
    known = _known(rewards)
    deviation = _deviation(known)
    if deviation <= EQUAL:
        return [0.0] * len(rewards)
    mean = statistics.fmean(known)
    return [0.0 if reward is None else (reward - mean) / deviation for reward in rewards]


def _known(rewards: Sequence[float | None]) -> list[float]:
    return [reward for reward in rewards if reward is not None]


def _deviation(known: Sequence[float]) -> float:
    return statistics.stdev(known) if len(known) > 1 and math.isfinite(sum(known)) else 0.0
