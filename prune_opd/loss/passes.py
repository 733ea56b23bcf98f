"""What a chunk of the loss does with whole matrices of logits, by torch's own kernels.

    top          both models' k largest
    sums         what is summed over the vocabulary (loss/vocab_sums.py)
    divergence   an objective on the whole vocabulary: its value and the sum of its slopes
    gradient     ∂ℓ/∂logit, from slopes at a few candidates and from such an objective

In this order; each may use up the logits of the one before it. loss/triton_passes.py has the same with kernels of our
own, which go through the logits less often.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from prune_opd.config import ObjectiveConfig
from prune_opd.loss.products import ready_
from prune_opd.loss.vocab_parallel import (
    BothLogits,
    TopK,
    VocabShard,
    local_columns,
    row_blocks,
    sum_together,
    topk_together,
)
from prune_opd.loss.vocab_sums import Apart, VocabSums, only_known_, vocab_sums_
from prune_opd.method.divergences import DIVERGENCES
from prune_opd.method.objective import is_priced, on_vocabulary

ON_DEVICE = 8  # parts that a chunk's columns are worked on in off the CPU, for the sake of what is held meanwhile


class Slopes(NamedTuple):
    """c_j = ∂ℓ/∂log p_j over the temperature: at candidates, and a multiple of an objective's on the vocabulary."""

    column_NK: Tensor  # columns of this rank; an id may stand there twice
    slope_NK: Tensor  # 0 where another rank has the candidate
    total_N1: Tensor  # Σ_j c_j over all ranks
    weight_N1: Tensor | None = None  # of the objective on the vocabulary, if there is one


class Passes:
    """Those of one chunk. logits_2NW: this rank's columns of both models, padding at `NOTHING`."""

    def __init__(self, both: BothLogits, part: slice, objective: ObjectiveConfig) -> None:
        self.logits_2NW, self.shards, self.objective = both.of(part), both.shards, objective
        self._student, self._scratch_2RW = both.heads[0], both.scratch_2RW
        self._in_logs = on_vocabulary(objective)

    def top(self, k: int) -> TopK:
        """The k largest logits of both models, over all ranks."""
        return topk_together(self.logits_2NW, k, self.shards)

    def sums(self, maximum_2N1: Tensor, apart: Apart | None) -> VocabSums:
        """Over this rank's columns; add them up over the group. maximum_2N1: over the whole vocabulary."""
        # The logits turn into what comes next: log p + log Σ, or p · Σ.
        sums = vocab_sums_(self.logits_2NW, self._scratch_2RW, maximum_2N1, self._in_logs, apart)
        return only_known_(sums, self.shards)

    def divergence(self, sums: VocabSums, log_total_2N1: Tensor, ids_NK: Tensor, teacher_logp_NK: Tensor) -> Tensor:
        """Value and slopes' sum [2, N], over all ranks' columns. ids_NK: where a priced teacher is known.

        A few rows at a time, whose temporaries stay in the cache; the slopes are written over the teacher's logits.
        """
        valid, sums_2N = self.shards[0].valid, log_total_2N1.new_zeros(2, log_total_2N1.shape[1])
        for part in row_blocks(self.logits_2NW, ON_DEVICE):
            student_RV, teacher_RV = self.logits_2NW[:, part, :valid].sub_(log_total_2N1[:, part])
            if is_priced(self.objective):
                price_(teacher_RV, ids_NK[part], teacher_logp_NK[part], self.shards[0], self.objective.outside_logp)
            value_N, slope_NV = DIVERGENCES[self.objective.name](student_RV, teacher_RV, self.objective)
            torch.stack([value_N, slope_NV.sum(dim=1)], out=sums_2N[:, part])
            teacher_RV.copy_(slope_NV)
        return sum_together([sums_2N], self.shards[0].group)[0]

    def gradient(self, slopes: Slopes, sums: VocabSums, log_total_2N1: Tensor) -> Tensor:
        """(c_v − p_v Σ_j c_j) [N, W] of this rank's columns of the student."""
        grad_logits_NW, slope_NW = self.logits_2NW
        if slopes.weight_N1 is None:
            grad_logits_NW.mul_(slopes.total_N1.div(sums.total_2N1[0]).neg_())
        else:
            valid = self.shards[0].valid
            grad_logits_NW[:, valid:] = 0
            for part in row_blocks(self.logits_2NW, ON_DEVICE):
                logp_RV = grad_logits_NW[part, :valid]
                logp_RV.exp_().mul_(-slopes.total_N1[part]).addcmul_(slope_NW[part, :valid], slopes.weight_N1[part])
        return grad_logits_NW.scatter_add_(1, slopes.column_NK, slopes.slope_NK)

    def ready(self, grad_logits_NW: Tensor) -> Tensor:
        """The gradient [N, V] of this rank's rows of the output weight, as the products take it."""
        return ready_(grad_logits_NW[:, : self._student.shard.rows], self._student.weight_VH, self.logits_2NW[1])


def price_(teacher_NV: Tensor, ids_NK: Tensor, teacher_logp_NK: Tensor, shard: VocabShard, outside_logp: float) -> None:
    """Replace the teacher's log q by what is left of it: renormalised at the candidates, `outside_logp` elsewhere."""
    column_NK, mine_NK = local_columns(ids_NK, shard)
    inside_NK = teacher_logp_NK.log_softmax(dim=-1)
    if mine_NK is not None:
        inside_NK = inside_NK.masked_fill(~mine_NK, -math.inf)
    # Ids of other ranks point to some column of this one: a maximum with −inf leaves what is there.
    column_NK = column_NK.clamp(max=max(teacher_NV.shape[1] - 1, 0))
    teacher_NV.fill_(-math.inf)
    if teacher_NV.shape[1]:
        teacher_NV.scatter_reduce_(1, column_NK, inside_NK, "amax")
    teacher_NV.masked_fill_(teacher_NV == -math.inf, outside_logp)
