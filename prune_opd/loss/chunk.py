"""One chunk of the fused loss: what both models say about its tokens, and the student's gradient from it.

`score_chunk` goes from hidden states to log-probabilities at a few candidates (and over this rank's columns of the
vocabulary where the objective is on all of it), `chunk_loss` to the loss and its derivative in them, and `Gradients`
goes back. See loss/distill.py for the whole picture.
"""

from __future__ import annotations

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
from prune_opd.loss.passes import Passes, Slopes
from prune_opd.loss.products import add_weight_gradient_, hidden_gradient_
from prune_opd.loss.triton_passes import TritonPasses
from prune_opd.loss.vocab_parallel import (
    BothLogits,
    OutputHead,
    VocabShard,
    columns_of_both,
    gather_both,
    group_size,
    local_columns,
    sum_together,
)
from prune_opd.loss.vocab_sums import Apart, VocabSums
from prune_opd.method.gate import Agreement, Views, judge, needs_nucleus
from prune_opd.method.objective import (
    Candidates,
    Pair,
    TokenLoss,
    candidates,
    clipped_policy_loss,
    has_baseline,
    has_rest,
    on_vocabulary,
    token_loss,
    top_k,
)
from prune_opd.method.weighting import Signals

PASSES: dict[str, type[Passes]] = {"torch": Passes, "triton": TritonPasses}  # by objective.kernels


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
    at: list[AtCandidates]  # one an objective, and one of the reward's term
    sampled_N: Tensor  # ids of what was sampled; with a class of ends, of the class
    passes: Passes  # through this rank's columns of the logits
    log_total_2N1: Tensor
    sums: VocabSums
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
    passes, shards = PASSES[method.objective.kernels](both, part, method.objective), both.shards
    logits_2NW = passes.logits_2NW
    sampled_N, ends = take_ends_(logits_2NW.unbind(), shards, sampled_N, method)  # then a class is one outcome
    top = passes.top(max(k, *map(top_k, objectives)))
    student_ids_NK, teacher_ids_NK = top.ids_NK
    chosen = [candidates(objective, sampled_N, student_ids_NK, teacher_ids_NK) for objective in objectives]
    if old is not None and old.reward_NK is not None:
        chosen[0] = old.candidates
    ids = [sampled_N[:, None], student_ids_NK[:, :k], *(of_objective.ids_NK for of_objective in chosen)]

    # All is read off the logits before they turn, in place, into something else. A top-k's first is the maximum.
    at_2NK, maximum_2N1 = gather_both(logits_2NW, torch.cat(ids, dim=1), shards), top.values_NK[..., :1]
    apart = _apart(chosen[0], shards) if has_rest(method.objective) else None
    mine = passes.sums(maximum_2N1, apart)
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
        sampled_N=sampled_N,
        outcome_logp_2N=outcome_2N1.squeeze(2),
        at=[
            AtCandidates(*where, logp_2NC[0], logp_2NC[1], log_rest)
            for where, logp_2NC, log_rest in zip(chosen, logp_at, rests, strict=True)
        ],
        passes=passes,
        log_total_2N1=log_total_2N1,
        sums=sums,
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


class Columns(NamedTuple):
    """Of an objective on the whole vocabulary; the passes have its slopes."""

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
        loss = _on_columns(scores, weight_N)
    else:
        logs = at.student_logp_NK, at.teacher_logp_NK
        baseline_N = scores.sums.reverse_kl() if has_baseline(objective) else None
        first = token_loss(objective, *logs, weight_N, at.valid_NK, at.log_rest, credit_N, baseline_N)
        loss = ChunkLoss(first.loss_N, first.divergence_N, first.grad_logp_NK, first=first)
        if old is not None and old.reward_NK is not None:
            loss = _against_old(loss, objective, at, old.logp_NK, old.reward_NK)
    for added, at, weight_N in zip(objectives[1:], scores.at[1:], weights[1:], strict=True):
        more = token_loss(added, at.student_logp_NK, at.teacher_logp_NK, weight_N, at.valid_NK)
        slope_NK = torch.cat([loss.slope_NK, more.grad_logp_NK], dim=1)
        loss = loss._replace(loss_N=loss.loss_N + more.loss_N, slope_NK=slope_NK)
    return loss


def add_reward(
    scores: Scores, loss: ChunkLoss, objective: ObjectiveConfig, advantage_N: Tensor, old_logp_N: Tensor | None
) -> tuple[Scores, ChunkLoss]:
    """Both with the term of a task's reward: −min(ρ A, clip(ρ) A) on what was sampled (method/advantage.py).

    old_logp_N: log p_old of it; None where the policy has not moved, ρ = 1. Nothing else of the loss changes, but that
    ratio and clipped are this term's where the objective has none.
    """
    logp_NK = scores.sampled_logp_N.unsqueeze(1)
    old_logp_NK = logp_NK if old_logp_N is None else old_logp_N.unsqueeze(1)
    term = clipped_policy_loss(objective, logp_NK, old_logp_NK, advantage_N.unsqueeze(1))
    sampled = AtCandidates(scores.sampled_N.unsqueeze(1), None, logp_NK, scores.outcome_logp_2N[1].unsqueeze(1))
    slope_NK = torch.cat([loss.slope_NK, term.grad_logp_NK], dim=1)
    loss = loss._replace(loss_N=loss.loss_N + term.loss_N, slope_NK=slope_NK)
    if old_logp_N is not None and loss.ratio_N is None:
        ratio_N = term.ratio_NK.squeeze(1)
        loss = loss._replace(ratio_N=ratio_N, clipped_N=term.clipped_NK.squeeze(1).to(ratio_N.dtype))
    return scores._replace(at=[*scores.at, sampled]), loss


def _on_columns(scores: Scores, weight_N: Tensor) -> ChunkLoss:
    """An objective on the whole vocabulary."""
    at = scores.at[0]
    divergence_N, total_N = scores.passes.divergence(scores.sums, scores.log_total_2N1, at.ids_NK, at.teacher_logp_NK)
    at_candidates_NK = torch.zeros_like(at.student_logp_NK)  # the columns have it all
    return ChunkLoss(weight_N * divergence_N, divergence_N, at_candidates_NK, Columns(weight_N, weight_N * total_N))


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
        total_N1, weight_N1 = slope_NK.sum(dim=1, keepdim=True), None
        if loss.columns is not None:
            weight_N1 = (loss.columns.weight_N / student.temperature).unsqueeze(1)
            total_N1 = total_N1 + (loss.columns.total_N / student.temperature).unsqueeze(1)
        here_NK = slope_NK if mine_NK is None else slope_NK * mine_NK
        slopes = Slopes(column_NK, here_NK, total_N1, weight_N1)
        grad_logits_NW = scores.passes.gradient(slopes, scores.sums, scores.log_total_2N1)
        if scores.end_class and scores.ends is not None:
            unfold_(grad_logits_NW, scores.ends.student_logp_NM, scores.end_class, student.shard)
        grad_logits_NV = scores.passes.ready(grad_logits_NW)
        dtype = scores.passes.logits_2NW.dtype
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
