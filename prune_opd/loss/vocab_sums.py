"""Both models' logits of a chunk to what is summed over the vocabulary, in one pass: normalisers, entropies, KL.

The pass goes through a few rows at a time, so that the scratch memory is small and each logit is still in the
processor's cache when the next sum needs it: the entropies and the exact reverse KL cost next to nothing beside the
normalisers, which are needed anyway.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from prune_opd.loss.vocab_parallel import VocabShard, group_size

BLOCKS = 64  # at most, in a chunk: the scratch memory is at least 1/64 of the logits
BLOCK_LOGITS = 1 << 18  # and a block has at least so many, or one row


def row_blocks(rows: int, width: int) -> list[slice]:
    """A few rows at a time of a [rows, width] matrix, for passes over it."""
    step = max(-(-rows // BLOCKS), BLOCK_LOGITS // width, 1)
    return [slice(begin, min(begin + step, rows)) for begin in range(0, rows, step)]


class Apart(NamedTuple):
    """Columns [N, K] whose exponentials are also left out of a sum, where `mine_NK` says that they count, each once."""

    column_NK: Tensor
    mine_NK: Tensor


class VocabSums(NamedTuple):
    """Sums over the vocabulary, each [N, 1], with e = exp(l), f = exp(m) of the logits less their maxima l and m."""

    student_total_N1: Tensor  # Σ e
    teacher_total_N1: Tensor  # Σ f
    student_entropy_N1: Tensor  # Σ e l
    teacher_entropy_N1: Tensor  # Σ f m
    gap_N1: Tensor  # Σ e (l − m); NaN where the ranks' columns are not the same token ids for both models
    student_rest_N1: Tensor | None = None  # Σ e without the columns that are apart
    teacher_rest_N1: Tensor | None = None

    def entropies(self) -> tuple[Tensor, Tensor]:
        """Of the student and of the teacher [N], in nats: log Σe − Σ e l / Σe."""
        student_N1 = self.student_total_N1.log() - self.student_entropy_N1 / self.student_total_N1
        teacher_N1 = self.teacher_total_N1.log() - self.teacher_entropy_N1 / self.teacher_total_N1
        return student_N1.squeeze(1), teacher_N1.squeeze(1)

    def reverse_kl(self) -> Tensor:
        """Σ_v p_v (log p_v − log q_v) [N] over the whole vocabulary, in nats; never below 0, NaN where unknown."""
        log_ratio_N1 = self.teacher_total_N1.log() - self.student_total_N1.log()
        return (self.gap_N1 / self.student_total_N1 + log_ratio_N1).clamp(min=0).squeeze(1)

    def log_rest(self) -> tuple[Tensor, Tensor] | None:
        """Log of both models' mass outside the columns that are apart [N]; finite even where there is none."""
        if self.student_rest_N1 is None or self.teacher_rest_N1 is None:
            return None
        tiny = torch.finfo(self.student_total_N1.dtype).tiny
        student_N1 = (self.student_rest_N1 / self.student_total_N1).clamp(min=tiny).log()
        teacher_N1 = (self.teacher_rest_N1 / self.teacher_total_N1).clamp(min=tiny).log()
        return student_N1.squeeze(1), teacher_N1.squeeze(1)


def vocab_sums_(
    logits: tuple[Tensor, Tensor],
    maxima: tuple[Tensor, Tensor],
    shards: tuple[VocabShard, VocabShard],
    keep_logs: bool,
    apart: tuple[Apart, Apart] | None = None,
) -> VocabSums:
    """The sums over this rank's columns; add them up over the group. Each pair: the student's, the teacher's.

    logits: [N, rows], used up: the student's become exp(logit − maximum), or logit − maximum if `keep_logs`; the
    teacher's become the latter. maxima: [N, 1] over the whole vocabulary. apart: see `VocabSums`.
    """
    (student_NV, teacher_NV), (student_shard, teacher_shard) = logits, shards
    aligned = group_size(student_shard.group) == 1 or student_shard.rows == teacher_shard.rows
    parts = row_blocks(len(student_NV), max(student_NV.shape[1], teacher_NV.shape[1]))
    rows = len(student_NV[parts[0]]) if parts else 0
    scratch = student_NV.new_empty(2, rows, max(student_shard.valid, teacher_shard.valid))
    sums_NS = student_NV.new_full((len(student_NV), 7), float("nan"))
    for part in parts:
        # Padding, at −inf, is left out: 0 · −inf is not a number.
        l_RV = student_NV[part, : student_shard.valid].sub_(maxima[0][part])
        m_RV = teacher_NV[part, : teacher_shard.valid].sub_(maxima[1][part])
        first, second = (buffer[: len(l_RV)] for buffer in scratch)
        e_RV = torch.exp(l_RV, out=first[:, : l_RV.shape[1]])
        spare_RV = second[:, : l_RV.shape[1]]
        sums_NS[part, 2] = torch.mul(e_RV, l_RV, out=spare_RV).sum(dim=1)
        if aligned:
            sums_NS[part, 4] = sums_NS[part, 2] - torch.mul(e_RV, m_RV, out=spare_RV).sum(dim=1)
        _totals(e_RV, sums_NS[part], 0, None if apart is None else apart[0], part)
        if not keep_logs:
            l_RV.copy_(e_RV)
        f_RV = torch.exp(m_RV, out=first[:, : m_RV.shape[1]])
        sums_NS[part, 3] = torch.mul(f_RV, m_RV, out=second[:, : m_RV.shape[1]]).sum(dim=1)
        _totals(f_RV, sums_NS[part], 1, None if apart is None else apart[1], part)
    if not keep_logs:
        student_NV[:, student_shard.valid :] = 0
    columns = sums_NS.split(1, dim=1)
    return VocabSums(*(columns if apart is not None else columns[:5]))


def _totals(exp_RV: Tensor, sums_RS: Tensor, model: int, apart: Apart | None, part: slice) -> None:
    """Σ exp of a block, and without what is apart. Not by a difference: 1 − p has no digits left where p is near 1."""
    if apart is None:
        sums_RS[:, model] = exp_RV.sum(dim=1)
        return
    column_RK, mine_RK = apart.column_NK[part], apart.mine_NK[part]
    at_RK = exp_RV.gather(1, column_RK).masked_fill(~mine_RK, 0)
    exp_RV.scatter_add_(1, column_RK, -at_RK)  # x − x is exactly 0, and 0 + x exactly x
    rest_R = exp_RV.sum(dim=1)
    exp_RV.scatter_add_(1, column_RK, at_RK)
    sums_RS[:, 5 + model] = rest_R
    sums_RS[:, model] = rest_R + at_RK.sum(dim=1)
