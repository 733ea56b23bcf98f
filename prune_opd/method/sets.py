"""Which ids of one set are in another, token by token, in memory that grows with k and not with k² where k is large."""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 1 << 22  # ids that are looked up at a time: about 0.2 GiB of scratch memory
PAIRS = 1 << 26  # pairs of ids, one byte each, that are compared at once


def count_among(ids_NK: Tensor, others_NC: Tensor) -> Tensor:
    """How many of `ids` are in `others`, int64 [...], both without repetition: all pairs at once where they are few."""
    if ids_NK.numel() * others_NC.shape[-1] <= PAIRS and ids_NK.shape[-1] * others_NC.shape[-1] <= 1024:
        return (ids_NK.unsqueeze(-1) == others_NC.unsqueeze(-2)).sum((-2, -1))
    return among(ids_NK, others_NC).sum(-1)


def among(ids_NK: Tensor, others_NC: Tensor, counted_NC: Tensor | None = None) -> Tensor:
    """Which of `ids` are in `others`, bool [..., K]: the others are sorted, and each id is searched for.

    ids_NK: integers at least 0 [..., K], in any order. others_NC: integers [..., C], C ≥ 1, with the same leading
    dimensions. counted_NC: bool, which of the others count at all; None: all do.
    """
    if counted_NC is not None:
        others_NC = others_NC.masked_fill(~counted_NC, -1)
    shape, width = ids_NK.shape, others_NC.shape[-1]
    ids_NK, others_NC = ids_NK.reshape(-1, shape[-1]), others_NC.reshape(-1, width)
    found_NK = torch.empty(ids_NK.shape, dtype=torch.bool, device=ids_NK.device)
    rows = max(BLOCK // max(shape[-1], width), 1)
    for begin in range(0, len(ids_NK), rows):
        part = slice(begin, begin + rows)
        sorted_RC = others_NC[part].sort(dim=-1).values
        place_RK = torch.searchsorted(sorted_RC, ids_NK[part].contiguous()).clamp_(max=width - 1)
        torch.eq(sorted_RC.gather(1, place_RK), ids_NK[part], out=found_NK[part])
    return found_NK.view(shape)
