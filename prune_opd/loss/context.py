"""Context parallelism in the loss: the ranks of a group share the tokens of the same responses.

The gate counts along whole responses, so a rank that holds only some of their tokens needs to hear of the others'. What
is exchanged is small, a few numbers a token, never hidden states or logits: events before the loss (and a weighting's
signals, if it needs whole responses), statistics after it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class ContextShard:
    """Which of a packed batch's response tokens are on this rank. Every token is on exactly one rank of the group."""

    index_N: Tensor  # their places among all of the batch's response tokens, int64
    tokens: int  # of the whole batch
    group: dist.ProcessGroup

    def whole(self, parts_N: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
        """Several per-token values of this rank [N] as those of all the batch's tokens, on every rank: one all-reduce.

        They travel in `dtype` and come back as what they were; exact for flags and for what `dtype` can hold.
        """
        whole = torch.zeros(len(parts_N), self.tokens, dtype=dtype, device=self.index_N.device)
        for row, part_N in zip(whole, parts_N, strict=True):
            row[self.index_N] = part_N.to(dtype)
        dist.all_reduce(whole, group=self.group)
        return [row.to(part_N.dtype) for row, part_N in zip(whole, parts_N, strict=True)]
