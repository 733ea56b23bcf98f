"""Which looks of the in-flight gate are worth their price, judged by the batches before.

A look is a response length at which the teacher judges the responses that have come so far. The loss knows of every
response, stopped or not, after how many tokens its reliability was gone. So afterwards it is known what each look would
have cost and saved in the last batches, also a look that was left out. For a choice C of the schedule's looks:

    V(C) = (1 + price) · Σ_i (L_i − c_i) − price · Σ_{c ∈ C} Σ_{i goes on after c} (prompt_i + c)

L_i: the length of response i, an estimate where it was stopped. c_i: the first look in C at or after the token with
which R_i reached 0; L_i if there is none. The first sum counts the response tokens that are avoided. The teacher does
not read them either, and its pass over a stopped response is the one that the loss needs anyway. The second sum counts
what the teacher reads in vain. The next batch gets the looks with the greatest V, none if no look pays.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

BATCHES = 4  # the last ones, which are remembered


class Course(NamedTuple):
    """How a response went, in tokens. spent: after how many of them R was 0, None if it never was."""

    prompt: int
    length: float
    spent: int | None


class LookSchedule:
    """Chooses the looks of the next batch by how the last batches' responses went. Saved in the run's checkpoints."""

    def __init__(self, price: float) -> None:
        self.price = price
        self.batches: deque[list[Course]] = deque(maxlen=BATCHES)

    def learn(self, batch: Sequence[Course]) -> None:
        if self.price > 0:
            self.batches.append(list(batch))

    def choose(self, looks: Sequence[int]) -> tuple[int, ...]:
        """The ones of `looks` (ascending) that pay; all of them while nothing is known, or the price is 0."""
        if not self.batches:
            return tuple(looks)
        courses = np.array([course for batch in self.batches for course in batch], dtype=float).reshape(-1, 3)
        # best[j + 1]: the most valuable choice whose last look is looks[j], with its value. best[0]: no look.
        best: list[tuple[float, tuple[int, ...]]] = [(0.0, ())]
        for j, look in enumerate(looks):
            options = (
                (value + self._gain(courses, looks[i - 1] if i else 0, look), (*chosen, look))
                for i, (value, chosen) in enumerate(best[: j + 1])
            )
            best.append(max(options, key=lambda option: option[0]))
        return max(best, key=lambda option: option[0])[1]

    def _gain(self, courses: np.ndarray, before: int, at: int) -> float:
        """Value of a look at `at` if the look before it was at `before`. courses: rows of `Course`, None as NaN."""
        prompt, length, spent = courses.T
        running = (length > at) & ~(spent <= before)
        stops = running & (spent <= at)
        avoided, in_vain = (length - at)[stops].sum(), (prompt + at)[running & ~stops].sum()
        return float((1 + self.price) * avoided - self.price * in_vain)

    def state_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {"batches": [[list(course) for course in batch] for batch in self.batches]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.batches.clear()
        for batch in state["batches"]:
            self.learn([Course(*course) for course in batch])
