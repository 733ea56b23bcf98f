"""The gate that judges a pair by itself: has the agreement changed along a response (ours; method.md §7)?

A constant threshold cannot serve all pairs: of a student that is far from its teacher everywhere, nearly every token is
an event from the first one on, and of two sure models the events are noise. Here the acceptance a_t of a token
(method/gate.py) is held against what is usual for the pair in the first tokens of its responses, where no prefix has
drifted yet, and Page's CUSUM test (Biometrika 41, 1954) looks for a lasting fall:

    z_t = (mean − a_t) / deviation, at most 3        deviations that this token lies below the usual
    S_t = max(0, S_{t−1} + z_t − slack)              what has come together, more than `slack` a token
    B_t = 1[S_t ≥ alarm]                             an event; `apply_gate` goes on from here

slack = .5 is the test's usual constant for a shift of one deviation; alarm = 8 is above the usual 4 to 5, chosen by eye
on training prompts of both tiny pairs, where 5 to 10 differ little. One odd token is no alarm: it counts 3, and fades.
Nothing here has a gradient.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from prune_opd.config import GateConfig
from prune_opd.errors import ConfigError
from prune_opd.method.packed import Pieces

LARGEST = 3.0  # z of one token
LEAST_DEVIATION = 0.05  # of acceptance: two equal models would see a change in every rounding
_UNIT = 1 << 20  # sums are of whole numbers, so that the cut into pieces does not change them


class Usual(NamedTuple):
    """Acceptance where nothing has drifted (or KL, in nats): the mean over tokens, and how far tokens are from it."""

    mean: float
    deviation: float


class Calibration:
    """Finds what is usual for a pair, in the first tokens of the responses of some steps. Part of the checkpoint.

    These are the first steps of a run for the acceptance of `change_point`, and the last ones for the KL of
    `kl_agreement`. Until a step has been taken there is nothing to compare with, and no event.
    """

    def __init__(self, gate: GateConfig | None) -> None:
        self.wanted = gate is not None and gate.needs_usual
        self._of_kl = gate is not None and gate.metric == "kl_agreement"
        self._most = gate.calibration_steps if gate else 0
        self._steps: list[tuple[float, ...]] = []  # of each: tokens, Σ a, Σ a², Σ KL

    @property
    def usual(self) -> Usual | None:
        tokens, total, squares, kl = map(sum, zip((0.0,) * 4, *self._steps, strict=True))
        if not self.wanted or tokens == 0:
            return None
        if self._of_kl:
            return Usual(kl / tokens, 0.0)
        mean = total / tokens
        return Usual(
            mean, max((squares / tokens - mean**2) ** 0.5 if squares / tokens > mean**2 else 0, LEAST_DEVIATION)
        )

    def update(self, early: Sequence[float]) -> None:
        """Take in a finished step: tokens, Σ a, Σ a² and Σ KL over the first `gate.early_tokens` of its responses."""
        if self._of_kl or len(self._steps) < self._most:
            self._steps = [*self._steps, tuple(early)][-self._most :]

    def record(self) -> dict[str, float]:
        """Its part of a step record: what the next step will be judged by."""
        usual = self.usual
        if usual is None:
            return {}
        if self._of_kl:
            return {"usual_kl": usual.mean}
        return {"usual_acceptance": usual.mean, "usual_deviation": usual.deviation}

    def state_dict(self) -> dict[str, Any]:
        return {"steps": [list(step) for step in self._steps]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a checkpoint's state, or an older version's. ConfigError when a value is missing."""
        try:
            if "sums" in state:  # of all steps together
                done = int(state["done"])
                self._steps = [(*map(float, state["sums"]), 0.0), *[(0.0,) * 4] * (done - 1)][:done]
            else:
                self._steps = [tuple(map(float, step)) for step in state["steps"]]
        except KeyError as error:
            raise ConfigError(
                f"the checkpoint's gate calibration has no {error}: resume from another checkpoint"
            ) from None


class ChangePoint:
    """The CUSUM test along responses that are packed end to end, fed in order and in pieces of any size.

    cu_seqlens: B + 1 offsets on the host, as `PackedGate` takes them. usual: None for no events.
    """

    def __init__(
        self, cu_seqlens: Sequence[int], gate: GateConfig, usual: Usual | None, device: torch.device | str = "cpu"
    ) -> None:
        self._pieces = Pieces(cu_seqlens, device)
        self._gate, self._usual = gate, usual
        steepest = math.ceil(LARGEST + 1 / LEAST_DEVIATION + gate.slack)
        self._apart = steepest * _UNIT * (cu_seqlens[-1] + 1)  # more than any sum along a response can change
        self._sum, self._lowest = (torch.zeros((), dtype=torch.int64, device=device) for _ in range(2))

    def advance(self, acceptance_C: Tensor) -> Tensor:
        """The next tokens' acceptance [C] to their events, bool [C]."""
        piece = self._pieces.take(len(acceptance_C))
        if self._usual is None or len(acceptance_C) == 0:
            return torch.zeros_like(acceptance_C, dtype=torch.bool)
        mean, deviation = self._usual
        z_C = ((mean - acceptance_C.double()) / deviation).clamp(max=LARGEST)
        sum_C = piece.sum_in_response(((z_C - self._gate.slack) * _UNIT).round().long(), self._sum)
        # The lowest sum of a response so far: each response lies far below the one before, so that none sees that.
        shift_C = piece.response_C * self._apart
        lowest_C = ((sum_C - shift_C).cummin(0).values + shift_C).clamp(max=0)
        lowest_C = torch.where(piece.continued_C, torch.minimum(lowest_C, self._lowest), lowest_C)
        self._sum, self._lowest = sum_C[-1], lowest_C[-1]
        return sum_C - lowest_C >= round(self._gate.alarm * _UNIT)
