"""Both models' logits of a chunk to what is summed over the vocabulary: normalisers, entropies, KL.

All comes from the exponentials that the normalisers need anyway: with e = exp(l), f = exp(m) of the logits less their
maxima l and m, the four sums Σ e l, Σ e m, Σ f l, Σ f m are one small product for each token, [e; f] @ [l, m].
On a CPU it goes through a few rows at a time, which are still in the cache when the product needs them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from prune_opd.loss.vocab_parallel import VocabShard, group_size, row_blocks

# A product adds up its terms one after the other. Parts of the vocabulary by themselves keep fp32's digits.
PARTS = 16


class Apart(NamedTuple):
    """Columns [2, N, K] whose exponentials are also left out of a sum, each once; `mine` are those that count."""

    column_2NK: Tensor
    mine_2NK: Tensor | None


class VocabSums(NamedTuple):
    """Sums over the vocabulary, of the student and of the teacher, with e, f, l, m as above."""

    total_2N1: Tensor  # Σ e, Σ f
    cross_N22: Tensor  # Σ e l, Σ e m; Σ f l, Σ f m. NaN beside the diagonal where ranks have not the same ids of both
    rest_2N1: Tensor | None = None  # Σ e, Σ f without the columns that are apart

    def entropies(self) -> tuple[Tensor, Tensor]:
        """Of the student and of the teacher [N], in nats: log Σe − Σ e l / Σe."""
        total_2N = self.total_2N1.squeeze(2)
        student_N, teacher_N = total_2N.log() - self.cross_N22.diagonal(dim1=1, dim2=2).T / total_2N
        return student_N, teacher_N

    def reverse_kl(self) -> Tensor:
        """Σ_v p_v (log p_v − log q_v) [N] over the whole vocabulary, in nats; never below 0, NaN where unknown."""
        return self._kl(0).clamp(min=0)

    def both_kl(self) -> tuple[Tensor, Tensor]:
        """KL(p ‖ q) and KL(q ‖ p) [N] as they come out: a rounding may bring them below 0."""
        return self._kl(0), self._kl(1)

    def _kl(self, of: int) -> Tensor:
        """Of this model to the other."""
        own_N, other_N = self.total_2N1[of].squeeze(1), self.total_2N1[1 - of].squeeze(1)
        gap_N = self.cross_N22[:, of, of] - self.cross_N22[:, of, 1 - of]
        return gap_N / own_N + other_N.log() - own_N.log()

    def log_rest(self) -> tuple[Tensor, Tensor] | None:
        """Log of both models' mass outside the columns that are apart [N]; finite even where there is none."""
        if self.rest_2N1 is None:
            return None
        tiny = torch.finfo(self.total_2N1.dtype).tiny
        student_N, teacher_N = (self.rest_2N1 / self.total_2N1).clamp(min=tiny).log().squeeze(2)
        return student_N, teacher_N

    @staticmethod
    def concatenate(chunks: list[VocabSums]) -> VocabSums:
        """Concatenate the chunks' sums, but for the rest."""
        return VocabSums(torch.cat([of.total_2N1 for of in chunks], dim=1), torch.cat([of.cross_N22 for of in chunks]))


def vocab_sums_(
    logits_2NW: Tensor, scratch_2RW: Tensor, maximum_2N1: Tensor, keep_logs: bool, apart: Apart | None = None
) -> VocabSums:
    """The sums over this rank's columns, with torch's own kernels.

    logits_2NW: used up; they become exp(logit − maximum), or logit − maximum if `keep_logs`. maximum_2N1: over the
    whole vocabulary. apart: see `VocabSums`.
    """
    _, rows, width = logits_2NW.shape
    total_2N1 = torch.empty_like(maximum_2N1)
    rest_2N1 = None if apart is None else torch.empty_like(maximum_2N1)
    cross_C22 = logits_2NW.new_empty(rows * PARTS, 2, 2)
    for part in row_blocks(logits_2NW):
        logits_2RW, maximum_2R1 = logits_2NW[:, part], maximum_2N1[:, part]
        other_2RW = scratch_2RW[:, : part.stop - part.start]
        if keep_logs:
            log_2RW = logits_2RW.sub_(maximum_2R1)
            exp_2RW = torch.exp(log_2RW, out=other_2RW)
        else:
            log_2RW = torch.sub(logits_2RW, maximum_2R1, out=other_2RW)
            exp_2RW = torch.exp(log_2RW, out=logits_2RW)
        exp_2CP, log_2CP = (of.view(2, -1, width // PARTS) for of in (exp_2RW, log_2RW))
        products_C22 = cross_C22[part.start * PARTS : part.stop * PARTS]
        torch.bmm(exp_2CP.permute(1, 0, 2), log_2CP.permute(1, 2, 0), out=products_C22)
        if apart is None or rest_2N1 is None:
            torch.sum(exp_2RW, dim=2, keepdim=True, out=total_2N1[:, part])
            continue
        # Not by a difference: 1 − p has no digits left where p is near 1.
        column_2RK = apart.column_2NK[:, part]
        at_2RK = exp_2RW.gather(2, column_2RK)
        if apart.mine_2NK is not None:
            at_2RK *= apart.mine_2NK[:, part]
        exp_2RW.scatter_add_(2, column_2RK, -at_2RK)  # x − x is exactly 0, and 0 + x exactly x
        torch.sum(exp_2RW, dim=2, keepdim=True, out=rest_2N1[:, part])
        exp_2RW.scatter_add_(2, column_2RK, at_2RK)
        torch.add(rest_2N1[:, part], at_2RK.sum(dim=2, keepdim=True), out=total_2N1[:, part])
    return VocabSums(total_2N1, cross_C22.view(rows, PARTS, 2, 2).sum(dim=1), rest_2N1)


def only_known_(sums: VocabSums, shards: Sequence[VocabShard]) -> VocabSums:
    """Take away what compares both models where this rank has not the same ids of them."""
    student, teacher = shards
    if group_size(student.group) > 1 and student.rows != teacher.rows:
        sums.cross_N22[:, 0, 1] = sums.cross_N22[:, 1, 0] = float("nan")
    return sums
