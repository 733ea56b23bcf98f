"""The gate that judges a pair by itself: has the agreement changed along a response (ours; method.md §7)?

A constant threshold cannot serve all pairs: of a student that is far from its teacher everywhere, nearly every token is
an event from the first one on, and of two sure models the events are noise. Here the acceptance a_t of a token
(method/gate.py) is held against what is usual for the pair (method/calibration.py), and Page's CUSUM test (Biometrika
41, 1954) looks for a lasting fall:

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

import torch
from torch import Tensor

from prune_opd.config import GateConfig
from prune_opd.method.calibration import LEAST_DEVIATION, Usual
from prune_opd.method.packed import Pieces

LARGEST = 3.0  # z of one token
_UNIT = 1 << 20  # sums are of whole numbers, so that the cut into pieces does not change them


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
        mean, deviation = self._usual[:2]
        z_C = ((mean - acceptance_C.double()) / deviation).clamp(max=LARGEST)
        sum_C = piece.sum_in_response(((z_C - self._gate.slack) * _UNIT).round().long(), self._sum)
        # The lowest sum of a response so far: each response lies far below the one before, so that none sees that.
        shift_C = piece.response_C * self._apart
        lowest_C = ((sum_C - shift_C).cummin(0).values + shift_C).clamp(max=0)
        lowest_C = torch.where(piece.continued_C, torch.minimum(lowest_C, self._lowest), lowest_C)
        self._sum, self._lowest = sum_C[-1], lowest_C[-1]
        return sum_C - lowest_C >= round(self._gate.alarm * _UNIT)
