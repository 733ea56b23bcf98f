"""What stays fixed of a batch that serves several updates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from prune_opd.method.objective import Candidates


@dataclass(frozen=True)
class OldPolicy:
    """What stays fixed of N tokens while several updates are made with them (method.md §1), from before the first.

    Always the weights of the objectives: gate and weighting. Of a policy gradient also its candidates, log p_old of
    each and the weighted reward r_tj (with log p_old and the renormalised share w_tj in it): PPO's fixed advantages. A
    divergence has no rewards (None): it is taken anew of the moved student, with the fixed weight.
    """

    weights: list[Tensor]  # [N] of each objective
    candidates: Candidates
    logp_NK: Tensor
    reward_NK: Tensor | None
    sampled_logp_N: Tensor | None = None  # of the sampled tokens, where a task's reward gives them
    advantage_N: Tensor | None = None  # these, corrected

    @staticmethod
    def concatenate(chunks: Sequence[OldPolicy]) -> OldPolicy:
        """Concatenate the chunks' policies."""

        def cat(tensors: Sequence[Tensor | None]) -> Any:
            return None if tensors[0] is None else torch.cat(tensors)  # type: ignore[arg-type]

        return OldPolicy(
            weights=[cat(weights) for weights in zip(*(chunk.weights for chunk in chunks), strict=True)],
            candidates=Candidates(*(cat(field) for field in zip(*(chunk.candidates for chunk in chunks), strict=True))),
            logp_NK=cat([chunk.logp_NK for chunk in chunks]),
            reward_NK=cat([chunk.reward_NK for chunk in chunks]),
            sampled_logp_N=cat([chunk.sampled_logp_N for chunk in chunks]),
            advantage_N=cat([chunk.advantage_N for chunk in chunks]),
        )

    def part(self, part: slice) -> OldPolicy:
        """Slice of these tokens."""
        ids_NK, valid_NK = self.candidates

        def of(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor[part]

        return OldPolicy(
            [weight_N[part] for weight_N in self.weights],
            Candidates(ids_NK[part], of(valid_NK)),
            self.logp_NK[part],
            of(self.reward_NK),
            of(self.sampled_logp_N),
            of(self.advantage_N),
        )
