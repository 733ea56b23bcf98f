"""What the gate saw of the global batch: added up micro-batch by micro-batch, then over the ranks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from prune_opd.loss.distill import GateStats

PER_TOKEN = ("overlap", "event", "weight", "divergence")


class BatchStats:
    """Sums over response tokens, also by position in the response (`bins` of equal width over `max_len` tokens).

    watched: rows of the global batch whose single tokens are kept too, for whoever wants to look at them.
    """

    def __init__(self, responses: int, bins: int, max_len: int, device: torch.device, watched: Sequence[int] = ()):
        self.bins, self.max_len, self.watched = bins, max_len, tuple(watched)
        shape = (len(self.watched), len(PER_TOKEN), max_len)
        self.tokens_W4T = torch.zeros(shape, dtype=torch.float64, device=device)  # PER_TOKEN of the watched rows
        self.reliable_length_B = torch.zeros(responses, dtype=torch.float64, device=device)
        self.sums = torch.zeros(len(PER_TOKEN), bins, dtype=torch.float64, device=device)
        self.count = torch.zeros(bins, dtype=torch.float64, device=device)
        self.ratio_3 = torch.zeros(3, dtype=torch.float64, device=device)  # sums of ratio and clipped, tokens
        self.stale_3 = torch.zeros(3, dtype=torch.float64, device=device)  # the same of an older student's tokens

    def add(self, rows: Sequence[int], stats: GateStats) -> None:
        """Take in one micro-batch: `rows` of the global batch, in the order in which they are packed."""
        self.reliable_length_B[list(rows)] = stats.reliable_length_B.double()
        length_B = stats.length_B
        start_B = length_B.cumsum(0) - length_B
        position_N = torch.arange(len(stats.overlap_N), device=length_B.device) - start_B.repeat_interleave(length_B)
        bin_N = (position_N * self.bins // self.max_len).clamp_max(self.bins - 1)
        values = (stats.overlap_N, stats.event_N, stats.weight_N, stats.divergence_N)
        value_4N = torch.stack([value_N.double() for value_N in values])
        for i, value_N in enumerate(value_4N):
            self.sums[i].index_add_(0, bin_N, value_N)
        self.count.index_add_(0, bin_N, torch.ones_like(bin_N, dtype=torch.float64))
        if stats.stale_ratio_N is not None and stats.stale_clipped_N is not None:
            stale_N = ~stats.stale_ratio_N.isnan()
            sums = (stats.stale_ratio_N[stale_N], stats.stale_clipped_N[stale_N], stale_N)
            self.stale_3 += torch.stack([part.double().sum() for part in sums])
        for i, row in enumerate(self.watched):
            if row in rows:
                place = list(rows).index(row)
                first, length = int(start_B[place]), min(int(length_B[place]), self.max_len)
                self.tokens_W4T[i, :, :length] = value_4N[:, first : first + length]

    def miss(self, rows: Sequence[int]) -> None:
        """Note that a micro-batch could not be judged: its responses have no reliable length, its tokens no part."""
        self.reliable_length_B[list(rows)] = math.nan

    def add_ratio(self, stats: GateStats) -> None:
        """Take in one micro-batch of an update: how far the student has moved from the policy that sampled it."""
        if stats.ratio_N is not None and stats.clipped_N is not None:
            counted = torch.ones_like(stats.ratio_N)
            self.ratio_3 += torch.stack([stats.ratio_N, stats.clipped_N, counted]).double().sum(1)

    def reduce(self, counts: bool) -> None:
        """Make every rank's sums those of the global batch: one collective of the whole job.

        counts: whether this rank's sums are taken; each token must be in those of one rank (`Layout.reports`).
        """
        parts = [self.reliable_length_B, self.sums, self.count, self.ratio_3, self.stale_3, self.tokens_W4T]
        flat = torch.cat([part.flatten() for part in parts])
        if not counts:
            flat.zero_()
        dist.all_reduce(flat)
        whole = flat.split([part.numel() for part in parts])
        views = [values.view_as(part) for values, part in zip(whole, parts, strict=True)]
        self.reliable_length_B, self.sums, self.count, self.ratio_3, self.stale_3, self.tokens_W4T = views

    def record(self) -> dict[str, Any]:
        """The gate's part of a step record in metrics.jsonl."""
        overlap, event, weight, divergence = (self.sums.sum(1) / self.count.sum().clamp_min(1)).tolist()
        ratio, clipped, updated = self.ratio_3.tolist()
        moved = {"ratio_mean": ratio / updated, "clip_fraction": clipped / updated} if updated else {}
        ratio, clipped, stale = self.stale_3.tolist()
        corrected = {"stale_ratio_mean": ratio / stale, "stale_clip_fraction": clipped / stale} if stale else {}
        return {
            "overlap": overlap,
            "event_rate": event,
            "weight_mean": weight,
            "divergence": divergence,
            "reliable_length": self.reliable_length_B.mean().item(),
            "overlap_by_position": self._curve(self.sums[PER_TOKEN.index("overlap")]),
            "weight_by_position": self._curve(self.sums[PER_TOKEN.index("weight")]),
            **moved,
            **corrected,
        }

    def lengths(self, length_B: Sequence[int]) -> list[int]:
        """How many responses end in each bin, the place of their last tokens; empty ones are in the first."""
        count = [0] * self.bins
        for length in length_B:
            count[min(max(length - 1, 0) * self.bins // self.max_len, self.bins - 1)] += 1
        return count

    def _curve(self, sums: Tensor) -> list[float | None]:
        pairs = zip(sums.tolist(), self.count.tolist(), strict=True)
        return [total / count if count else None for total, count in pairs]
