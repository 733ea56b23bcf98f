"""One chunk of the fused loss: what both models say about its tokens, and the student's gradient from it.

`score_chunk` goes from hidden states to log-probabilities at a few candidates (and over this rank's columns of the
vocabulary where the objective is on all of it), `chunk_loss` to the loss and its derivative in them, and `Gradients`
goes back. See loss/distill.py for the whole picture.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from prune_opd.config import ObjectiveConfig
from prune_opd.loss.ends import AtEnds, take_ends_, token_logp, unfold_
from prune_opd.loss.inputs import Method
from prune_opd.loss.old_policy import OldPolicy
from prune_opd.loss.products import add_weight_gradient_, hidden_gradient
from prune_opd.loss.vocab_parallel import (
    OutputHead,
    VocabShard,
    group_size,
    local_columns,
    local_gather,
    sum_together,
    topk_together,
)
from prune_opd.loss.vocab_sums import Apart, VocabSums, row_blocks, vocab_sums_
from prune_opd.method.gate import Agreement, Views, judge
from prune_opd.method.objective import (
    Candidates,
    Pair,
    candidates,
    clipped_policy_loss,
    has_rest,
    is_priced,
    on_vocabulary,
    token_loss,
    top_k,
)
from prune_opd.method.weighting import Signals


class AtCandidates(NamedTuple):
    """The candidates of one objective, and both models' log-probabilities there, the same on every rank."""

    ids_NK: Tensor
    valid_NK: Tensor | None
    student_logp_NK: Tensor
    teacher_logp_NK: Tensor
    log_rest: Pair | None = None  # log of both models' mass [N] on all other ids, where the objective asks for it


class Scores(NamedTuple):
    """One chunk as both models score it. Log-probabilities are over the full vocabulary."""

    agreement: Agreement
    sampled_logp_N: Tensor  # of the outcome: of the class where an end of one was sampled
    token_logp_N: Tensor  # of the sampled id itself
    signals: Signals
    at: list[AtCandidates]  # one an objective
    student_NV: Tensor  # this rank's columns, in the student's buffer: log p if `in_logs`, else p · student_total
    student_total_N1: Tensor
    teacher_NV: Tensor  # log q if `in_logs`
    in_logs: bool
    shard: VocabShard  # the student's
    finite_2: Tensor  # whether the student's and the teacher's normalisers are numbers
    ends: AtEnds | None = None  # where there are terminal ids
    end_class: tuple[int, ...] = ()  # those that are one outcome


def score_chunk(
    student: OutputHead,
    teacher: OutputHead,
    sampled_ids_N: Tensor,
    part: slice,
    method: Method,
    *,
    old: OldPolicy | None = None,
) -> Scores:
    """The tokens of `part` through both output heads.

    old: take the candidates of its policy gradient, if it has one.
    """
    objectives, k, sampled_N = method.objectives, method.gate_k, sampled_ids_N[part]
    in_logs = on_vocabulary(method.objective)
    logits, shards = (student.logits(part), teacher.logits(part)), (student.shard, teacher.shard)
    sampled_N, ends = take_ends_(logits, shards, sampled_N, method)  # from here on a class of them is one outcome
    tops = topk_together(logits, max(k, *map(top_k, objectives)), shards)
    student_ids_NK, teacher_ids_NK = (top.ids_NK for top in tops)
    chosen = [candidates(objective, sampled_N, student_ids_NK, teacher_ids_NK) for objective in objectives]
    if old is not None and old.reward_NK is not None:
        chosen[0] = old.candidates
    ids = [sampled_N[:, None], student_ids_NK[:, :k], *(of_objective.ids_NK for of_objective in chosen)]
    ids_NK = torch.cat(ids, dim=1)

    # All is read off the logits before they turn, in place, into something else. A top-k's first is the maximum.
    at = [local_gather(logits_NV, ids_NK, shard) for logits_NV, shard in zip(logits, shards, strict=True)]
    maxima = tops[0].values_NK[:, :1], tops[1].values_NK[:, :1]
    apart = _apart(chosen[0], shards) if has_rest(method.objective) else None
    mine = vocab_sums_(logits, maxima, shards, in_logs, apart)
    given = [part for part in mine if part is not None]
    *at, sums_NS = sum_together([*at, torch.cat(given, dim=1)], student.shard.group)
    sums = VocabSums(*sums_NS.split(1, dim=1))
    # logit − max − log Σ: with max + log Σ as one number, large logits would cost digits of small log-probabilities.
    logs = sums.student_total_N1.log(), sums.teacher_total_N1.log()
    student_logp_NK, teacher_logp_NK = (
        at_NK - maximum_N1 - log_N1 for at_NK, maximum_N1, log_N1 in zip(at, maxima, logs, strict=True)
    )
    ends = None if ends is None else ends.less(maxima, logs)
    if in_logs:
        for logits_NV, log_N1 in zip(logits, logs, strict=True):
            logits_NV.sub_(log_N1)

    widths = [part.shape[1] for part in ids]
    (student_y_N1, student_k_NK, *student_at), (teacher_y_N1, teacher_k_NK, *teacher_at) = (
        logp_NK.split(widths, dim=1) for logp_NK in (student_logp_NK, teacher_logp_NK)
    )
    views = Views(
        sampled_ids=sampled_N,
        student_ids=student_ids_NK[:, :k],
        student_logp=student_k_NK,
        teacher_logp_there=teacher_k_NK,
        teacher_ids=teacher_ids_NK[:, :k],
        teacher_logp=tops[1].values_NK[:, :k] - maxima[1] - logs[1],
    )
    rests = [sums.log_rest(), *(None for _ in chosen[1:])]
    return Scores(
        agreement=judge(views, method.gate),
        sampled_logp_N=student_y_N1[:, 0],
        token_logp_N=token_logp(student_y_N1[:, 0], ends),
        signals=Signals((teacher_y_N1 - student_y_N1)[:, 0], *sums.entropies(), sums.reverse_kl()),
        at=[
            AtCandidates(*where, logp_NK, logq_NK, log_rest)
            for where, logp_NK, logq_NK, log_rest in zip(chosen, student_at, teacher_at, rests, strict=True)
        ],
        student_NV=logits[0],
        student_total_N1=sums.student_total_N1,
        teacher_NV=logits[1],
        in_logs=in_logs,
        shard=student.shard,
        finite_2=torch.cat(logs, dim=1).isfinite().all(dim=0),
        ends=ends,
        end_class=method.end_class,
    )


def _apart(chosen: Candidates, shards: tuple[VocabShard, VocabShard]) -> tuple[Apart, Apart]:
    """Where this rank has the candidates of a token, for either model."""
    valid_NK = True if chosen.valid_NK is None else chosen.valid_NK
    (student_NK, student_mine_NK), (teacher_NK, teacher_mine_NK) = (
        local_columns(chosen.ids_NK, shard) for shard in shards
    )
    return Apart(student_NK, student_mine_NK & valid_NK), Apart(teacher_NK, teacher_mine_NK & valid_NK)


# ---------------------------------------------------------------------------------------------------- loss


class ChunkLoss(NamedTuple):
    """Of all objectives together; divergence, reward, ratio and clipped are the first one's. Slopes: see Gradients."""

    loss_N: Tensor
    divergence_N: Tensor
    slope_NK: Tensor
    column_slope_NV: Tensor | None = None
    column_total_N: Tensor | None = None
    reward_NK: Tensor | None = None
    ratio_N: Tensor | None = None  # mean p / p_old of a token's candidates
    clipped_N: Tensor | None = None  # share of them that is clipped


def chunk_loss(
    scores: Scores,
    objectives: Sequence[ObjectiveConfig],
    weights: Sequence[Tensor],
    old: OldPolicy | None,
    credit_N: Tensor | None = None,
) -> ChunkLoss:
    """The objectives at a chunk's scores, each with its weight [N]; the first against the old policy, if any.

    credit_N: the first one's rewards, where later tokens have a part in them.
    """
    objective, at, weight_N = objectives[0], scores.at[0], weights[0]
    if on_vocabulary(objective):
        if is_priced(objective):
            price_(scores.teacher_NV, at, scores.shard, objective.outside_logp)
        loss = _on_columns(scores, objective, weight_N)
    else:
        loss_N, slope_NK, divergence_N, reward_NK = token_loss(
            objective, at.student_logp_NK, at.teacher_logp_NK, weight_N, at.valid_NK, at.log_rest, credit_N
        )
        loss = ChunkLoss(loss_N, divergence_N, slope_NK, reward_NK=reward_NK)
        if old is not None and old.reward_NK is not None:
            loss = _against_old(loss, objective, at, old.logp_NK, old.reward_NK)
    for added, at, weight_N in zip(objectives[1:], scores.at[1:], weights[1:], strict=True):
        more = token_loss(added, at.student_logp_NK, at.teacher_logp_NK, weight_N, at.valid_NK)
        slope_NK = torch.cat([loss.slope_NK, more.grad_logp_NK], dim=1)
        loss = loss._replace(loss_N=loss.loss_N + more.loss_N, slope_NK=slope_NK)
    return loss


def _on_columns(scores: Scores, objective: ObjectiveConfig, weight_N: Tensor) -> ChunkLoss:
    """An objective on the whole vocabulary: this rank's columns, and its sums over the group.

    A few rows at a time, whose temporaries stay in the cache; the slopes are written over the teacher's.
    """
    student_NV, slope_NV = (part[:, : scores.shard.valid] for part in (scores.student_NV, scores.teacher_NV))
    mine_N3 = weight_N.new_zeros(len(weight_N), 3)
    for part in row_blocks(len(weight_N), scores.shard.rows):
        columns = token_loss(objective, student_NV[part], slope_NV[part], weight_N[part])
        sums = [columns.loss_N, columns.divergence_N, columns.grad_logp_NK.sum(dim=1)]
        torch.stack(sums, dim=1, out=mine_N3[part])
        slope_NV[part] = columns.grad_logp_NK
    loss_N, divergence_N, total_N = sum_together([mine_N3], scores.shard.group)[0].unbind(1)
    at_candidates_NK = torch.zeros_like(scores.at[0].student_logp_NK)  # the columns have it all
    return ChunkLoss(loss_N, divergence_N, at_candidates_NK, slope_NV, total_N)


def price_(teacher_NV: Tensor, at: AtCandidates, shard: VocabShard, outside_logp: float) -> None:
    """Replace the teacher's log q by what is left of it: renormalised at the candidates, `outside_logp` elsewhere."""
    column_NK, mine_NK = local_columns(at.ids_NK, shard)
    inside_NK = at.teacher_logp_NK.log_softmax(dim=-1).masked_fill(~mine_NK, -math.inf)
    # Ids of other ranks all point to column 0: a maximum with −inf leaves what is there.
    teacher_NV.fill_(-math.inf).scatter_reduce_(1, column_NK, inside_NK, "amax")
    teacher_NV.masked_fill_(teacher_NV == -math.inf, outside_logp)


def _against_old(
    loss: ChunkLoss, objective: ObjectiveConfig, at: AtCandidates, old_logp_NK: Tensor, reward_NK: Tensor
) -> ChunkLoss:
    """A policy gradient with the fixed rewards, and the clipped ratio to the policy that sampled the tokens."""
    clipped = clipped_policy_loss(objective, at.student_logp_NK, old_logp_NK, reward_NK)
    valid_NK = torch.ones_like(clipped.clipped_NK) if at.valid_NK is None else at.valid_NK
    count_N = valid_NK.sum(dim=1)
    # A token without a candidate has none that moved.
    ratio_N = torch.where(count_N > 0, (clipped.ratio_NK * valid_NK).sum(dim=1) / count_N, 1.0)
    clipped_N = (clipped.clipped_NK & valid_NK).sum(dim=1) / count_N.clamp(min=1)
    return ChunkLoss(
        clipped.loss_N,
        loss.divergence_N,
        clipped.grad_logp_NK,
        ratio_N=ratio_N,
        clipped_N=clipped_N.to(ratio_N.dtype),
    )


# ---------------------------------------------------------------------------------------------------- gradients


class Gradients:
    """The student's two gradients, added up chunk by chunk; the weight's in the caller's buffer if there is one."""

    def __init__(
        self, student: OutputHead, want_hidden: bool, want_weight: bool, weight_grad_VH: Tensor | None = None
    ) -> None:
        self._student = student
        # At least fp32: in bf16 the sum over many chunks, or over the ranks' shards, would lose the small ones.
        dtype = torch.promote_types(student.dtype, torch.float32)
        of_hidden = dtype if group_size(student.shard.group) > 1 else student.dtype
        self._hidden_NH = torch.empty_like(student.hidden_NH, dtype=of_hidden) if want_hidden else None
        self._in_buffer = weight_grad_VH is not None
        self._weight_VH = weight_grad_VH if want_weight else None
        if want_weight and weight_grad_VH is None:
            self._weight_VH = torch.zeros_like(student.weight_VH, dtype=dtype)

    def add(self, part: slice, scores: Scores, loss: ChunkLoss) -> None:
        """From c_j = ∂ℓ/∂log p_j to ∂ℓ/∂logit_v = (c_v − p_v Σ_j c_j) / temperature, and on to hidden and weight.

        loss.slope_NK: c at the objectives' candidates, one objective after the other; an id may stand there twice.
        loss.column_slope_NV: c of this rank's token ids, for an objective on the whole vocabulary, with its sum over
        all ranks in loss.column_total_N. Uses up `scores`.
        """
        if self._hidden_NH is None and self._weight_VH is None:
            return
        student = self._student
        coefficient_NK = loss.slope_NK / student.temperature
        ids_NK = torch.cat([at.ids_NK for at in scores.at], dim=1)
        column_NK, mine_NK = local_columns(ids_NK, student.shard)
        total_N1 = coefficient_NK.sum(dim=1, keepdim=True)
        if loss.column_total_N is not None:
            total_N1 = total_N1 + loss.column_total_N.unsqueeze(1) / student.temperature
        if scores.in_logs:
            grad_logits_NV = scores.student_NV.exp_().mul_(-total_N1)
        else:
            grad_logits_NV = scores.student_NV.mul_(-total_N1 / scores.student_total_N1)
        if loss.column_slope_NV is not None:
            grad_logits_NV[:, : student.shard.valid].add_(loss.column_slope_NV, alpha=1 / student.temperature)
        grad_logits_NV.scatter_add_(1, column_NK, coefficient_NK.masked_fill(~mine_NK, 0))
        if scores.end_class and scores.ends is not None:
            unfold_(grad_logits_NV, scores.ends.student_logp_NM, scores.end_class, student.shard)
        if self._hidden_NH is not None:
            self._hidden_NH[part] = hidden_gradient(grad_logits_NV, student.weight_VH)
        if self._weight_VH is not None:
            add_weight_gradient_(self._weight_VH, grad_logits_NV, student.hidden_NH[part])

    def finish(self) -> tuple[Tensor | None, Tensor | None]:
        """Hidden gradient, complete on every rank, and this rank's weight gradient, in the inputs' dtype.

        None for what was not wanted, and for a weight gradient that is in the caller's buffer.
        """
        student = self._student
        if self._hidden_NH is not None and group_size(student.shard.group) > 1:
            # Each rank has gone through its own columns of the vocabulary only.
            dist.all_reduce(self._hidden_NH, group=student.shard.group)
        hidden_NH = None if self._hidden_NH is None else self._hidden_NH.to(student.dtype)
        if self._weight_VH is None or self._in_buffer:
            return hidden_NH, None
        return hidden_NH, self._weight_VH.to(student.dtype)


class WithGradients(torch.autograd.Function):
    """Gives a loss the gradients that were formed with it.

    in_buffer: the weight's is in the caller's buffer already, as it is for an upstream gradient of 1. The weight stays
    an input, so that a backward always comes through here, and gets no gradient: its hooks run, with nothing to add.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_NH: Tensor,
        weight_VH: Tensor,
        loss_sum: Tensor,
        grad_hidden_NH: Tensor | None,
        grad_weight_VH: Tensor | None,
        in_buffer: bool,
    ) -> Tensor:
        ctx.save_for_backward(grad_hidden_NH, grad_weight_VH)
        ctx.in_buffer, ctx.spent = in_buffer, False
        return loss_sum.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden_NH, grad_weight_VH = ctx.saved_tensors
        if ctx.in_buffer:
            if ctx.spent:
                raise RuntimeError(
                    "a second backward through a loss with weight_grad: the buffer has the weight's gradient once; "
                    "call distill_loss again"
                )
            ctx.spent = True
            upstream = grad_loss.item()
            if upstream != 1:
                raise ValueError(
                    f"the gradient that reaches loss_sum is {upstream:g}, but weight_grad already holds the weight's "
                    "gradient for 1: back-propagate loss_sum itself and scale the gradients afterwards, or leave "
                    "weight_grad out"
                )
        # In place, unless the graph is kept for another backward: a second weight gradient would outweigh the logits.
        scale = torch.mul if torch._C._autograd._get_current_graph_task_keep_graph() else Tensor.mul_
        return (
            scale(grad_hidden_NH, grad_loss) if ctx.needs_input_grad[0] else None,
            scale(grad_weight_VH, grad_loss) if grad_weight_VH is not None and ctx.needs_input_grad[1] else None,
            None,
            None,
            None,
            None,
        )
