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
from prune_opd.loss.products import add_weight_gradient_, hidden_gradient_, ready_
from prune_opd.loss.vocab_parallel import (
    BothLogits,
    OutputHead,
    VocabShard,
    columns_of_both,
    gather_both,
    group_size,
    local_columns,
    row_blocks,
    sum_together,
    topk_together,
)
from prune_opd.loss.vocab_sums import Apart, VocabSums, vocab_sums_
from prune_opd.method.divergences import DIVERGENCES
from prune_opd.method.gate import Agreement, Views, judge, needs_nucleus
from prune_opd.method.objective import (
    Candidates,
    Pair,
    TokenLoss,
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
    outcome_logp_2N: Tensor  # both models' of what was sampled: of the class where an end of one was
    at: list[AtCandidates]  # one an objective
    logits_2NW: Tensor  # this rank's columns, the student's first: log p + log_total if `in_logs`, else p · total
    log_total_2N1: Tensor
    sums: VocabSums
    in_logs: bool
    shard: VocabShard  # the student's
    ends: AtEnds | None = None  # where there are terminal ids
    end_class: tuple[int, ...] = ()  # those that are one outcome

    @property
    def sampled_logp_N(self) -> Tensor:
        return self.outcome_logp_2N[0]

    @property
    def token_logp_N(self) -> Tensor:
        """Of the sampled id itself."""
        return token_logp(self.outcome_logp_2N[0], self.ends)

    @property
    def signals(self) -> Signals:
        student_N, teacher_N = self.outcome_logp_2N
        return Signals(teacher_N - student_N, *self.sums.entropies(), self.sums.reverse_kl())


def score_chunk(
    both: BothLogits, sampled_ids_N: Tensor, part: slice, method: Method, *, old: OldPolicy | None = None
) -> Scores:
    """The tokens of `part` through both output heads.

    old: take the candidates of its policy gradient, if it has one.
    """
    objectives, k, sampled_N = method.objectives, method.gate_k, sampled_ids_N[part]
    in_logs, shards = on_vocabulary(method.objective), both.shards
    logits_2NW = both.of(part)
    sampled_N, ends = take_ends_(logits_2NW.unbind(), shards, sampled_N, method)  # then a class is one outcome
    top = topk_together(logits_2NW, max(k, *map(top_k, objectives)), shards)
    student_ids_NK, teacher_ids_NK = top.ids_NK
    chosen = [candidates(objective, sampled_N, student_ids_NK, teacher_ids_NK) for objective in objectives]
    if old is not None and old.reward_NK is not None:
        chosen[0] = old.candidates
    ids = [sampled_N[:, None], student_ids_NK[:, :k], *(of_objective.ids_NK for of_objective in chosen)]

    # All is read off the logits before they turn, in place, into something else. A top-k's first is the maximum.
    at_2NK, maximum_2N1 = gather_both(logits_2NW, torch.cat(ids, dim=1), shards), top.values_NK[..., :1]
    apart = _apart(chosen[0], shards) if has_rest(method.objective) else None
    mine = vocab_sums_(both, logits_2NW, maximum_2N1, in_logs, apart)
    at_2NK, *whole = sum_together([at_2NK, *(of for of in mine if of is not None)], shards[0].group)
    sums = VocabSums(*whole)
    # logit − max − log Σ: with max + log Σ as one number, large logits would cost digits of small log-probabilities.
    log_total_2N1 = sums.total_2N1.log()
    logp_2NK = (at_2NK - maximum_2N1).sub_(log_total_2N1)
    ends = None if ends is None else ends.less(maximum_2N1.unbind(), log_total_2N1.unbind())

    nucleus_NK = None
    if needs_nucleus(method.gate):
        nucleus_NK = top.values_NK[1, :, :k] - maximum_2N1[1] - log_total_2N1[1]
    outcome_2N1, there_2NK, *logp_at = logp_2NK.split([part.shape[1] for part in ids], dim=2)
    views = Views(
        sampled_ids=sampled_N,
        student_ids=student_ids_NK[:, :k],
        logp=there_2NK,
        teacher_ids=teacher_ids_NK[:, :k],
        teacher_logp=nucleus_NK,
    )
    rests = [sums.log_rest(), *(None for _ in chosen[1:])]
    return Scores(
        agreement=judge(views, method.gate),
        outcome_logp_2N=outcome_2N1.squeeze(2),
        at=[
            AtCandidates(*where, logp_2NC[0], logp_2NC[1], log_rest)
            for where, logp_2NC, log_rest in zip(chosen, logp_at, rests, strict=True)
        ],
        logits_2NW=logits_2NW,
        log_total_2N1=log_total_2N1,
        sums=sums,
        in_logs=in_logs,
        shard=shards[0],
        ends=ends,
        end_class=method.end_class,
    )


def _apart(chosen: Candidates, shards: tuple[VocabShard, VocabShard]) -> Apart:
    """Where this rank has the candidates of a token, for either model."""
    column_2NK, mine_2NK = columns_of_both(chosen.ids_NK, shards)
    if chosen.valid_NK is not None:
        mine_2NK = chosen.valid_NK.expand(column_2NK.shape) if mine_2NK is None else mine_2NK & chosen.valid_NK
    return Apart(column_2NK, mine_2NK)


# ---------------------------------------------------------------------------------------------------- loss


ON_DEVICE = 8  # parts that a chunk's columns are worked on in off the CPU, for the sake of what is held meanwhile


class Columns(NamedTuple):
    """Slopes of an objective on the whole vocabulary, unweighted, are in the place of the teacher's logits."""

    weight_N: Tensor
    total_N: Tensor  # weighted, over all ranks' columns


class ChunkLoss(NamedTuple):
    """Of all objectives together; divergence, reward, ratio and clipped are the first one's. Slopes: see Gradients."""

    loss_N: Tensor
    divergence_N: Tensor
    slope_NK: Tensor
    columns: Columns | None = None
    first: TokenLoss | None = None  # None for an objective on the whole vocabulary, or against an old policy
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
        loss = _on_columns(scores, objective, weight_N)
    else:
        first = token_loss(
            objective, at.student_logp_NK, at.teacher_logp_NK, weight_N, at.valid_NK, at.log_rest, credit_N
        )
        loss = ChunkLoss(first.loss_N, first.divergence_N, first.grad_logp_NK, first=first)
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
    at, valid = scores.at[0], scores.shard.valid
    sums_2N = weight_N.new_zeros(2, len(weight_N))
    for part in row_blocks(scores.logits_2NW, ON_DEVICE):
        student_RV, teacher_RV = scores.logits_2NW[:, part, :valid].sub_(scores.log_total_2N1[:, part])
        if is_priced(objective):
            price_(teacher_RV, at.ids_NK[part], at.teacher_logp_NK[part], scores.shard, objective.outside_logp)
        value_N, slope_NV = DIVERGENCES[objective.name](student_RV, teacher_RV, objective)
        torch.stack([value_N, slope_NV.sum(dim=1)], out=sums_2N[:, part])
        teacher_RV.copy_(slope_NV)
    divergence_N, total_N = sum_together([sums_2N], scores.shard.group)[0]
    at_candidates_NK = torch.zeros_like(at.student_logp_NK)  # the columns have it all
    return ChunkLoss(weight_N * divergence_N, divergence_N, at_candidates_NK, Columns(weight_N, weight_N * total_N))


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
        loss.columns: where there are more c, of this rank's token ids. Uses up `scores`.
        """
        if self._hidden_NH is None and self._weight_VH is None:
            return
        student = self._student
        slope_NK = loss.slope_NK if student.temperature == 1 else loss.slope_NK / student.temperature
        ids = [at.ids_NK for at in scores.at]
        column_NK, mine_NK = local_columns(ids[0] if len(ids) == 1 else torch.cat(ids, dim=1), student.shard)
        total_N1 = slope_NK.sum(dim=1, keepdim=True)
        grad_logits_NW, spare_NW = scores.logits_2NW
        if loss.columns is None:
            grad_logits_NW.mul_(total_N1.div_(scores.sums.total_2N1[0]).neg_())
        else:
            _turn_columns_(scores, loss.columns, total_N1, student.temperature)
        grad_logits_NW.scatter_add_(1, column_NK, slope_NK if mine_NK is None else slope_NK * mine_NK)
        if scores.end_class and scores.ends is not None:
            unfold_(grad_logits_NW, scores.ends.student_logp_NM, scores.end_class, student.shard)
        dtype, rows = grad_logits_NW.dtype, student.shard.rows
        grad_logits_NV = ready_(grad_logits_NW[:, :rows], student.weight_VH, spare_NW)
        if self._hidden_NH is not None:
            hidden_gradient_(grad_logits_NV, student.weight_VH, self._hidden_NH[part], dtype)
        if self._weight_VH is not None:
            add_weight_gradient_(self._weight_VH, grad_logits_NV, student.hidden_NH[part], dtype)

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


def _turn_columns_(scores: Scores, columns: Columns, total_N1: Tensor, temperature: float) -> None:
    """log p to the gradient in this rank's logits, of slopes that stand in the place of the teacher's logits."""
    valid, total_N1 = scores.shard.valid, total_N1 + (columns.total_N / temperature).unsqueeze(1)
    weight_N1 = (columns.weight_N / temperature).unsqueeze(1)
    scores.logits_2NW[0, :, valid:] = 0
    for part in row_blocks(scores.logits_2NW, ON_DEVICE):
        logp_RV, slope_RV = scores.logits_2NW[:, part, :valid]
        logp_RV.exp_().mul_(-total_N1[part]).addcmul_(slope_RV, weight_N1[part])


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
