"""KAT's gate: both models have agreed for long, so there is nothing left to learn (arXiv 2606.09471; method.md §7).

On a failed prefix the teacher may come to agree with the student: the reverse KL is low, the overlap high, and no
correction comes any more. KAT ("Escaping the KL Agreement Trap in On-Policy Distillation") ends a rollout where a
sliding window shows persistent low KL, below "a dynamic training-adaptive threshold". The abstract and reviews of the
paper were read, not the paper. What they leave open is our reading:

    D_t = mean of KL(p ‖ q) over the last `low_tokens` tokens      the full vocabulary's, in nats
    B_t = 1[D_t < threshold · usual]                               an event; none before so many tokens
    usual = mean KL of the first `early_tokens` tokens of the responses of the last `calibration_steps` steps

The threshold follows the training, which brings the KL down everywhere: it is a share of what is usual where no text is
lost yet. With `w_drop` 1 and `w_base` 0 a response's tokens count for nothing after its first event, and stop in flight
(inflight/gate.py) if that is on; with `horizon.strategy=prune` the window follows. The tokens that the window needs to
see the agreement keep their weight. Low KL has two causes, a trap and a student that knows; nothing here tells which.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from prune_opd.config import GateConfig
from prune_opd.method.calibration import Usual
from prune_opd.method.change_point import ChangePoint
from prune_opd.method.packed import Pieces

_UNIT = 1 << 20  # sums are of whole numbers, so that the cut into pieces does not change them
UNKNOWN = 1e6  # KL of a token of which nothing is known [nats]: far above any threshold


class Watch(Protocol):
    """Finds events by a quantity of each token along packed responses, fed in order and in pieces of any size."""

    def advance(self, evidence_C: Tensor) -> Tensor:
        """The next tokens' evidence [C] to their events, bool [C]."""


def along_responses(
    cu_seqlens: Sequence[int], gate: GateConfig | None, usual: Usual | None, device: torch.device | str = "cpu"
) -> Watch | None:
    """The watch of a gate whose events need more than their own token; None for another gate."""
    if gate is None or not gate.along:
        return None
    return (AgreementTrap if needs_kl(gate) else ChangePoint)(cu_seqlens, gate, usual, device)


def needs_kl(gate: GateConfig | None) -> bool:
    """Whether the gate's evidence is the reverse KL over the vocabulary; that of others is the acceptance."""
    return gate is not None and gate.metric == "kl_agreement"


class AgreementTrap:
    """D and B of packed responses. cu_seqlens: B + 1 offsets on the host. usual: None for no events.

    `advance` takes KL(p ‖ q) of the next tokens [C], in nats; NaN counts as high.
    """

    def __init__(
        self, cu_seqlens: Sequence[int], gate: GateConfig, usual: Usual | None, device: torch.device | str = "cpu"
    ) -> None:
        self._pieces, self._span = Pieces(cu_seqlens, device), gate.low_tokens
        self._below = None if usual is None else round(gate.threshold * usual.kl * gate.low_tokens * _UNIT)
        self._before = torch.zeros(gate.low_tokens, dtype=torch.int64, device=device)  # the KL of so many tokens

    def advance(self, kl_C: Tensor) -> Tensor:
        part = self._pieces.next(len(kl_C))
        kl_C = kl_C.double().nan_to_num(nan=UNKNOWN).clamp(0, UNKNOWN)
        values = torch.cat([self._before, (kl_C * _UNIT).round().long()])
        self._before = values[len(kl_C) :]
        if self._below is None:
            return torch.zeros_like(kl_C, dtype=torch.bool)
        total = values.cumsum(0)
        low_C = total[self._span :] - total[: len(kl_C)] < self._below
        position_C = torch.arange(part.start, part.stop, device=kl_C.device) - self._pieces.start_N[part]
        return low_C & (position_C >= self._span - 1)
