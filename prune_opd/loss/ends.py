"""Several terminal ids as one outcome (`objective.ends = class`), and what both models think of ending.

A base student may end with one id and its teacher with another. As single ids they disagree at every end, and the
student is taught not to stop (arXiv 2609.20511). As a class they are one outcome for both models: its probability is
the sum of its members'.

    fold      right after a chunk's logits, in place: the lowest id gets log Σ exp of the members' logits, the others
              get `NOTHING`; a sampled member counts as the lowest id. All that follows (top-k, overlap, gate, sums,
              objectives) then sees one outcome, and the normaliser is as before.
    unfold    right before the gradient's products: ∂ℓ/∂logit of a member is its share of the class, exp(logit) over
              the members' sum, times ∂ℓ/∂logit of the class.

The members may lie on any ranks of a tensor-parallel group; their logits [N, M] are summed over it once each
time that a chunk is scored, and the class's gradient [N, 1] once more.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from prune_opd.loss.inputs import Method
from prune_opd.loss.vocab_parallel import NOTHING, VocabShard, sum_together


class AtEnds(NamedTuple):
    """Both models' log-probabilities at the terminal ids [N, M], the same on every rank, and where one was sampled."""

    student_logp_NM: Tensor
    teacher_logp_NM: Tensor
    sampled_NM: Tensor  # bool

    def less(self, maxima: Sequence[Tensor], logs: Sequence[Tensor]) -> AtEnds:
        """Logits to log-probabilities. Of both models, each [N, 1]: largest logit, and log Σ exp of the rest to it."""
        student_NM, teacher_NM = (at - top - log for at, top, log in zip(self[:2], maxima, logs, strict=True))
        return AtEnds(student_NM, teacher_NM, self.sampled_NM)

    def sums(self) -> Tensor:
        """Sums over tokens [5, M]: p and q where an end was sampled, p and q of all, how often each was sampled."""
        student_NM, teacher_NM = self.student_logp_NM.exp(), self.teacher_logp_NM.exp()
        ended_N1 = self.sampled_NM.any(dim=1, keepdim=True)
        rows = (student_NM * ended_N1, teacher_NM * ended_N1, student_NM, teacher_NM, self.sampled_NM)
        return torch.stack([row.double().sum(dim=0) for row in rows])


def take_ends_(
    logits: Sequence[Tensor], shards: Sequence[VocabShard], sampled_N: Tensor, method: Method
) -> tuple[Tensor, AtEnds | None]:
    """The sampled outcomes, and what both models say at the terminal ids, of logits [N, V/tp] folded in place.

    What is returned has logits, no log-probabilities yet: see `AtEnds.less`. None where there are no terminal ids.
    """
    if not method.terminal_ids:
        return sampled_N, None
    student_NM, teacher_NM = end_logits(logits, method.terminal_ids, shards)
    sampled_NM = torch.stack([sampled_N == i for i in method.terminal_ids], dim=1)
    at = AtEnds(student_NM, teacher_NM, sampled_NM)
    if method.end_class:
        for logits_NV, at_NM, shard in zip(logits, at[:2], shards, strict=True):
            fold_(logits_NV, at_NM, method.end_class, shard)
    return as_outcomes(sampled_N, method.end_class), at


def end_logits(logits: Sequence[Tensor], ids: Sequence[int], shards: Sequence[VocabShard]) -> list[Tensor]:
    """Each model's logits at the terminal ids, [N, M], complete on every rank: one sum over the group."""
    parts = [_at(logits_NV, ids, shard) for logits_NV, shard in zip(logits, shards, strict=True)]
    return sum_together(parts, shards[0].group)


def fold_(logits_NV: Tensor, at_NM: Tensor, ids: Sequence[int], shard: VocabShard) -> None:
    """Make the ids one outcome of this rank's columns, in place. at_NM: `end_logits`; ids ascending."""
    for member, column in _mine(ids, shard):
        logits_NV[:, column] = at_NM.logsumexp(dim=1) if member == 0 else NOTHING


def as_outcomes(ids_N: Tensor, ids: Sequence[int]) -> Tensor:
    """Token ids of any shape with the lowest of `ids` in the place of each of them."""
    for member in ids[1:]:
        ids_N = ids_N.masked_fill(ids_N == member, ids[0])
    return ids_N


def unfold_(grad_logits_NV: Tensor, student_logp_NM: Tensor, ids: Sequence[int], shard: VocabShard) -> None:
    """The gradient in the class's logit to those in its members', in place: each has its share. Collective."""
    (grad_N1,) = sum_together([_at(grad_logits_NV, ids[:1], shard)], shard.group)
    grad_NM = grad_N1 * student_logp_NM.softmax(dim=1)
    for member, column in _mine(ids, shard):
        grad_logits_NV[:, column] = grad_NM[:, member]


def token_logp(class_logp_N: Tensor, at: AtEnds | None) -> Tensor:
    """log p of the sampled id itself [N], where `class_logp_N` has that of the class it may belong to."""
    if at is None:
        return class_logp_N
    own_N = at.student_logp_NM.masked_fill(~at.sampled_NM, 0).sum(dim=1)
    return torch.where(at.sampled_NM.any(dim=1), own_N, class_logp_N)


def _at(values_NV: Tensor, ids: Sequence[int], shard: VocabShard) -> Tensor:
    """Values at the ids [N, M], 0 where another rank has the id."""
    at_NM = values_NV.new_zeros(len(values_NV), len(ids))
    for member, column in _mine(ids, shard):
        at_NM[:, member] = values_NV[:, column]
    return at_NM


def _mine(ids: Sequence[int], shard: VocabShard) -> list[tuple[int, int]]:
    """Which of the ids are on this rank, and their columns. On the host: a list that went to the device would wait."""
    columns = [(member, i - shard.first) for member, i in enumerate(ids)]
    return [(member, column) for member, column in columns if 0 <= column < shard.rows]


# ---------------------------------------------------------------------------------------------------- statistics


def end_record(sums_5M: Tensor, ids: Sequence[int], tokens: float) -> dict[str, float]:
    """The ends' part of a step record, from the sums of `AtEnds.sums` over `tokens` response tokens.

    Masses are taken where a terminal id was sampled: at the ends that the student took. Rates are means over all
    tokens; one over a rate is how long a response lasts at that rate.
    """
    student_M, teacher_M, student_rate_M, teacher_rate_M, count_M = sums_5M
    record = {
        "end_rate_student": student_rate_M.sum().item() / max(tokens, 1),
        "end_rate_teacher": teacher_rate_M.sum().item() / max(tokens, 1),
    }
    ends = count_M.sum().item()
    if not ends:
        return record
    record |= {
        "end_mass_student": student_M.sum().item() / ends,
        "end_mass_teacher": teacher_M.sum().item() / ends,
    }
    for name, mass_M in (("student", student_M), ("teacher", teacher_M)):
        record |= {f"end_mass_{name}_{i}": mass / ends for i, mass in zip(ids, mass_M.tolist(), strict=True)}
    return record | {f"end_share_{i}": count / ends for i, count in zip(ids, count_M.tolist(), strict=True)}
