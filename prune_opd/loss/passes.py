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
from prune_opd.method.objective import is_priced, kl_share, on_vocabulary

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
        self._in_logs, self._kl_share = on_vocabulary(objective), kl_share(objective)

    def top(self, k: int) -> TopK:
        """The k largest logits of both models, over all ranks."""
        return topk_together(self.logits_2NW, k, self.shards)

    def sums(self, maximum_2N1: Tensor, apart: Apart | None) -> VocabSums:
        """Over this rank's columns; add them up over the group. maximum_2N1: over the whole vocabulary."""
        # The logits turn into what comes next: log p + log Σ, or p · Σ.
        sums = vocab_sums_(self.logits_2NW, self._scratch_2RW, maximum_2N1, self._in_logs, apart)
        return only_known_(sums, self.shards)

    def divergence(self, sums: VocabSums, log_total_2N1: Tensor, ids_NK: Tensor, teacher_logp_NK: Tensor) -> Tensor:
        """Value and slopes' sum [2, N], over all ranks' columns. ids_NK: where a priced teacher is known."""
        if self._kl_share is not None:  # known already
            reverse_N, forward_N = sums.both_kl()
            total_N = (1 - self._kl_share) * reverse_N  # the forward KL's slopes p − q have none
            return torch.stack([self._kl_share * forward_N + total_N, total_N])
        own_2N = self._divergence(log_total_2N1, ids_NK, teacher_logp_NK)
        return sum_together([own_2N], self.shards[0].group)[0]

    def _divergence(self, log_total_2N1: Tensor, ids_NK: Tensor, teacher_logp_NK: Tensor) -> Tensor:
        """The same of this rank's columns, of another objective than a KL.

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
        return sums_2N

    def gradient(self, slopes: Slopes, sums: VocabSums, log_total_2N1: Tensor) -> Tensor:
        """(c_v − p_v Σ_j c_j) [N, W] of this rank's columns of the student."""
        grad_logits_NW, slope_NW = self.logits_2NW
        if slopes.weight_N1 is None:
            grad_logits_NW.mul_(slopes.total_N1.div(sums.total_2N1[0]).neg_())
        elif self._kl_share is not None:
            self._kl_gradient_(self._kl_share, slopes.total_N1, slopes.weight_N1, log_total_2N1)
        else:
            valid = self.shards[0].valid
            grad_logits_NW[:, valid:] = 0
            for part in row_blocks(self.logits_2NW, ON_DEVICE):
                logp_RV = grad_logits_NW[part, :valid]
                logp_RV.exp_().mul_(-slopes.total_N1[part]).addcmul_(slope_NW[part, :valid], slopes.weight_N1[part])
        return grad_logits_NW.scatter_add_(1, slopes.column_NK, slopes.slope_NK)

    def _kl_gradient_(self, share: float, total_N1: Tensor, weight_N1: Tensor, log_total_2N1: Tensor) -> None:
        """p (W (1 − φ) (log p − log q) + W φ − Σ c) − W φ q over the student's logits, φ = `share`."""
        forward_N1, reverse_N1 = share * weight_N1, (1 - share) * weight_N1
        constant_N1 = forward_N1 - total_N1 - reverse_N1 * (log_total_2N1[0] - log_total_2N1[1])
        for part in row_blocks(self.logits_2NW, ON_DEVICE if share else 1):
            student_RW, teacher_RW = self.logits_2NW[:, part]
            q_RW = (teacher_RW - log_total_2N1[1, part]).exp_().mul_(forward_N1[part]) if share else None
            torch.sub(student_RW, teacher_RW, out=teacher_RW)
            torch.addcmul(constant_N1[part], teacher_RW, reverse_N1[part], out=teacher_RW)
            student_RW.sub_(log_total_2N1[0, part]).exp_().mul_(teacher_RW)
            if q_RW is not None:
                student_RW.sub_(q_RW)

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
