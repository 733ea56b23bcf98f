"""Which checkpoints of the in-flight gate are worth their price, judged by the batches before.

The loss knows of every response, stopped or not, after how many tokens its reliability was gone. So what a checkpoint
would have cost and saved in the last batches is known afterwards, also of one that nobody looked at. With C ⊆ the
schedule's checkpoints,

    V(C) = (1 + price) · Σ_i (L_i − c_i) − price · Σ_{c ∈ C} Σ_{i goes on after c} (prompt_i + c)

c_i: the first checkpoint in C at or after the token with which R_i reached 0, L_i if there is none. L_i: the length, of
a stopped response an estimate. The first sum is of the response tokens that are avoided; the teacher does not read them
either, and its pass over a stopped response is the one that the loss needs. The second is what it reads in vain. The
next batch is looked at where V is greatest; nowhere, if no checkpoint pays.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

BATCHES = 4  # that are remembered


class Course(NamedTuple):
    """How a response went, in tokens. spent: after how many of them R was 0, None if it never was."""

    prompt: int
    length: float
    spent: int | None


class CheckpointPlan:
    """The last batches' responses, and what follows from them. Part of the checkpoint."""

    def __init__(self, price: float) -> None:
        self.price = price
        self.batches: deque[list[Course]] = deque(maxlen=BATCHES)

    def learn(self, batch: Sequence[Course]) -> None:
        if self.price > 0:
            self.batches.append(list(batch))

    def choose(self, checkpoints: Sequence[int]) -> tuple[int, ...]:
        """Those of the schedule's checkpoints, ascending, that pay; all while nothing is known or charged."""
        if not self.batches:
            return tuple(checkpoints)
        courses = np.array([course for batch in self.batches for course in batch], dtype=float).reshape(-1, 3)
        # Best value and best choice of those that end with checkpoint j; what came before the first one is 0.
        best: list[tuple[float, tuple[int, ...]]] = [(0.0, ())]
        for j, checkpoint in enumerate(checkpoints):
            options = (
                (value + self._gain(courses, checkpoints[i - 1] if i else 0, checkpoint), (*chosen, checkpoint))
                for i, (value, chosen) in enumerate(best[: j + 1])
            )
            best.append(max(options, key=lambda option: option[0]))
        return max(best, key=lambda option: option[0])[1]

    def _gain(self, courses: np.ndarray, before: int, at: int) -> float:
        """Of looking at `at` where the last look was at `before`. courses: rows of `Course`, None as NaN."""
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
