"""The loss: gated on-policy distillation from hidden states, in chunks of tokens (Prune-OPD, method.md §1 and §2).

One pass over the packed response tokens, in order. Of a chunk of n tokens, on every rank of the tensor-parallel group
(loss/chunk.py does it, method/objective.py has the objectives):

    student hidden ─ @ student weight shard ─▶ logits [n, V/tp] ─┬─▶ top-k ids ──┐
    teacher hidden ─ @ teacher weight shard ─▶ logits [n, V/tp] ─┼─▶ top-k ids ──┤  one all-gather
                                                                 │               ├─▶ overlap O ─▶ event B
                                                                 │    candidates ┘             │
                   log p_j, log q_j on candidates, log p(y) ◀────┘  one all-reduce             ▼
                                  │                                  (with Σ exp)   PackedGate: C ─▶ R ─▶ weight W
                                  ▼                                                            │
                  objective: loss ℓ and c_j = ∂ℓ/∂log p_j ◀────────────────────────────────────┘
                                  │
                                  ▼
                  ∂ℓ/∂logit_v = (c_v − p_v Σ_j c_j) / temperature      written over the student's logits
                                  ├─ @ student weight shard ─▶ hidden gradient    (all-reduced once, at the end)
                                  └─ᵀ@ student hidden ───────▶ weight gradient    (summed over the chunks)

The gate is a running count, so nothing of a later chunk is needed for an earlier one, and the gradient is formed while
the logits are there: no matrix product is computed twice and nothing of size tokens × vocabulary outlives its chunk.
What needs a whole response first (`weight_normalisation = mean`, iw_opd, tip) takes a pass before for that alone, and
so does a gate over context-parallel ranks, each of which has a part of every response (loss/context.py).

An objective on the whole vocabulary has every column of a rank as its candidates; its sums are all-reduced, and a chunk
of log-probabilities of both models is alive beside the logits. Where both models' vocabularies are padded differently,
the teacher's weight is first exchanged so that a rank holds the same ids of both (`OutputHead.align`).

A caller that keeps a gradient buffer of the output weight (megatron's `main_grad`) has the weight gradient added to it
right there (`weight_grad`), so that the loss holds nothing of the size of a weight.

When a batch serves several updates, a call with `keep_policy` before the first leaves in its statistics what is then
fixed (`OldPolicy`), and calls with `old` evaluate the moved student against that.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from prune_opd.config import GateConfig, ObjectiveConfig, WeightingConfig
from prune_opd.loss.chunk import Gradients, Look, OldPolicy, WithGradients, chunk_loss, look
from prune_opd.loss.context import ContextShard
from prune_opd.loss.inputs import check_buffer, check_stale, checked_offsets, raise_if_broken
from prune_opd.loss.vocab_parallel import OutputHead
from prune_opd.method.gate import PackedGate, apply_gate_packed
from prune_opd.method.objective import on_vocabulary
from prune_opd.method.weighting import (
    Signals,
    added_objective,
    added_on,
    needs_vocabulary,
    needs_whole_response,
    response_weights,
    stale_correction,
)

NO_WEIGHTING = WeightingConfig()


@dataclass(frozen=True)
class GateStats:
    """What the loss saw, detached: N packed tokens (fp32; fp64 for fp64 inputs) and B responses.

    With a context shard these are the tokens of all its group's ranks, on each of them; only `policy` is a rank's own.
    """

    overlap_N: Tensor  # O, always fp32; measured with objective.k where there is no gate
    event_N: Tensor  # B, bool
    reliability_N: Tensor  # R
    weight_N: Tensor  # of the objective: W, times the weighting's
    sampled_logp_N: Tensor  # student's log p(y_t)
    divergence_N: Tensor  # of the objective, before any weight [nats]
    reliable_length_B: Tensor  # E, int64
    length_B: Tensor  # int64
    ratio_N: Tensor | None = None  # p / p_old, mean of a token's candidates; None without an old policy or rewards
    clipped_N: Tensor | None = None  # share of a token's candidates that the clip has taken the gradient from
    policy: OldPolicy | None = None  # if asked for with keep_policy
    stale_ratio_N: Tensor | None = None  # p / p_sampled of stale tokens, NaN at the others; None where all are fresh
    stale_clipped_N: Tensor | None = None  # bool: whether the clip has changed that ratio


def distill_loss(
    student_hidden_NH: Tensor,
    student_weight_VH: Tensor,
    teacher_hidden_NH: Tensor,
    teacher_weight_VH: Tensor,
    sampled_ids_N: Tensor,
    cu_seqlens: Tensor | Sequence[int],
    gate: GateConfig | None,
    objective: ObjectiveConfig,
    tp_group: dist.ProcessGroup | None = None,
    *,
    vocab_size: int,
    chunk: int = 1024,
    weighting: WeightingConfig = NO_WEIGHTING,
    keep_policy: bool = False,
    old: OldPolicy | None = None,
    context: ContextShard | None = None,
    stale_logp_N: Tensor | None = None,
    weight_grad: Tensor | None = None,
) -> tuple[Tensor, int, GateStats]:
    """Σ_t ℓ_t over N packed response tokens, how many they are, and what the gate saw.

    The sum is left undivided: the loss is ONE token mean over the global batch, so the caller divides by the global
    token count. Differentiable in student_hidden_NH and student_weight_VH; the teacher gets no gradient.

    student_hidden_NH, teacher_hidden_NH: last hidden states (final norm applied) at the positions that predict the
        response tokens, in order, the same on all ranks of tp_group, each of which gets the whole gradient. The models'
        H may differ.
    student_weight_VH, teacher_weight_VH: output weights; with a tp_group this rank's shard of the (padded) vocabulary.
    sampled_ids_N: y_t, global token ids. cu_seqlens: the responses' B + 1 offsets, from 0 to N; empty ones allowed.
    gate: None for plain distillation (weight 1, no events). objective.temperature divides both models' logits.
    vocab_size: ids that exist; rows beyond it are padding. chunk: tokens whose logits are alive at a time.
    weighting: a weighting of the literature, beside the gate.
    keep_policy: leave in stats.policy what stays fixed of these tokens while several updates are made with them.
    old: that, when updates have been made since; the statistics are then the moved student's, but for weight_N.
    context: when the tokens are shared among context-parallel ranks: which of them these N are. cu_seqlens is then of
        all of them, and loss_sum, token_count and the weight's gradient are this rank's: add them up over the group.
    stale_logp_N: of tokens that an older student has sampled, log p with which it did, NaN at the others. Their weight
        is multiplied by the ratio of the student's p(y_t) to that, clipped to 1 ± objective.clip, as a constant. With
        `old` it is in the old weights already.
    weight_grad: buffer [V/tp, H], fp32 or of the weight's dtype, that the weight's gradient of loss_sum is added to
        while it is formed; student_weight_VH then gets none through autograd. It is there when this returns, so
        loss_sum must be back-propagated once, as it is: a backward that brings another upstream gradient than 1, or
        comes a second time, raises. What cannot be seen from here is left to the caller: a call whose loss is never
        back-propagated has been added all the same (without gradients, torch.no_grad(), nothing is), and after any
        error the buffer is spoilt.

    Returns (loss_sum, token_count, stats): loss_sum fp32 (fp64 for fp64 inputs) and token_count = N. Logits are taken
    to fp32 before any statistic, whatever the inputs' dtype. ConfigError for a setting, ValueError for a tensor that
    does not fit, both before anything is computed; after it `NotFiniteLogitsError`, a ValueError, for hidden states
    whose logits are not finite, and ValueError for sampled ids outside the vocabulary.
    """
    want_gradients = torch.is_grad_enabled() and (student_hidden_NH.requires_grad or student_weight_VH.requires_grad)
    student = OutputHead("student", student_hidden_NH, student_weight_VH, objective.temperature, vocab_size, tp_group)
    teacher = OutputHead("teacher", teacher_hidden_NH, teacher_weight_VH, objective.temperature, vocab_size, tp_group)
    offsets = checked_offsets(student, teacher, sampled_ids_N, cu_seqlens, gate, objective, weighting, chunk, context)
    check_stale(stale_logp_N, sampled_ids_N)
    if weight_grad is not None:
        check_buffer(weight_grad, student_weight_VH)
    with torch.no_grad():
        loop = _Pass(student, teacher, sampled_ids_N, offsets, gate, objective, weighting, chunk, context, stale_logp_N)
        gradients = Gradients(
            student,
            want_hidden=want_gradients and student_hidden_NH.requires_grad,
            want_weight=want_gradients and student_weight_VH.requires_grad,
            weight_grad_VH=weight_grad,
        )
        loss_sum, stats = loop.run(gradients, keep_policy, old)
        grad_hidden_NH, grad_weight_VH = gradients.finish()
    if want_gradients:
        in_buffer = weight_grad is not None
        loss_sum = WithGradients.apply(
            student_hidden_NH, student_weight_VH, loss_sum, grad_hidden_NH, grad_weight_VH, in_buffer
        )
    return loss_sum, len(sampled_ids_N), stats


class _Pass:
    """The loop over the chunks, and what it works on."""

    def __init__(
        self,
        student: OutputHead,
        teacher: OutputHead,
        sampled_ids_N: Tensor,
        offsets: list[int],
        gate: GateConfig | None,
        objective: ObjectiveConfig,
        weighting: WeightingConfig,
        chunk: int,
        context: ContextShard | None,
        stale_logp_N: Tensor | None,
    ) -> None:
        self.student, self.teacher, self.sampled_ids_N, self.offsets = student, teacher, sampled_ids_N, offsets
        self.gate, self.weighting, self.context, self.stale_logp_N = gate, weighting, context, stale_logp_N
        added = added_objective(weighting)
        self.objectives = [objective] if added is None else [objective, added]
        tokens = len(sampled_ids_N)
        # No tokens are one empty chunk: it has the right shapes, and takes part in what ranks exchange.
        self.chunks = [slice(begin, min(begin + chunk, tokens)) for begin in range(0, tokens, chunk)] or [slice(0, 0)]
        self.dtype = torch.promote_types(torch.promote_types(student.dtype, teacher.dtype), torch.float32)
        self.device = sampled_ids_N.device
        if on_vocabulary(objective) or needs_vocabulary(weighting):
            teacher.align(student.shard.rows)
        student.allocate(min(chunk, tokens), self.dtype)
        teacher.allocate(min(chunk, tokens), self.dtype)

    def run(self, gradients: Gradients, keep_policy: bool, old: OldPolicy | None) -> tuple[Tensor, GateStats]:
        """Loss sum and statistics; the gradients go to `gradients`."""
        tokens, device = len(self.sampled_ids_N), self.device
        running = PackedGate(self.offsets, self.gate, device, self.dtype)
        whole_gate_N, whole_weighting_N = (None, None) if old is not None else self._whole_response_weights()
        overlap_N = torch.empty(tokens, dtype=torch.float32, device=device)
        event_N = torch.empty(tokens, dtype=torch.bool, device=device)
        per_token = torch.empty(4, tokens, dtype=self.dtype, device=device)
        reliability_N, weight_N, sampled_logp_N, divergence_N = per_token.unbind()
        loss_sum = torch.zeros((), dtype=torch.float64, device=device)
        finite_2 = torch.ones(2, dtype=torch.bool, device=device)
        kept: list[OldPolicy] = []
        ratios: list[Tensor] = []
        for part in self.chunks:
            old_part = None if old is None else old.part(part)
            seen = self._look(part, old=old_part)
            overlap_N[part], event_N[part], sampled_logp_N[part] = seen.overlap_N, seen.event_N, seen.sampled_logp_N
            gate_N = None if whole_gate_N is None else whole_gate_N[part]
            if self.context is None:
                reliability_N[part], running_N = running.advance(seen.event_N)
                gate_N = running_N if gate_N is None else gate_N
            if old_part is not None:
                weights = old_part.weights
            else:
                assert gate_N is not None
                weights = [gate_N if whole_weighting_N is None else gate_N * whole_weighting_N[part]]
                weights += [gate_N * added_on(self.weighting, seen.signals) for _ in self.objectives[1:]]
                if self.stale_logp_N is not None:
                    correction_N = stale_correction(
                        seen.sampled_logp_N, self.stale_logp_N[part], self.objectives[0].clip
                    )
                    weights = [of_objective_N * correction_N for of_objective_N in weights]
            weight_N[part] = weights[0]
            loss = chunk_loss(seen, self.objectives, weights, old_part, self.student.shard)
            loss_sum += loss.loss_N.sum()
            divergence_N[part] = loss.divergence_N
            if loss.ratio_2N is not None:
                ratios.append(loss.ratio_2N)
            if keep_policy:
                kept.append(OldPolicy.of(seen.places[0], weights, loss.reward_NK))
            finite_2 &= seen.finite_2
            gradients.add(part, seen, loss.slope_NK, loss.column_slope_NV, loss.column_total_N)

        vocab_size = self.student.shard.vocab_size
        outside = ((self.sampled_ids_N < 0) | (self.sampled_ids_N >= vocab_size)).any()
        broken_3 = torch.cat([~finite_2, outside[None]]).int()
        moved = list(torch.cat(ratios, dim=1).unbind()) if ratios else []
        stale = [] if self.stale_logp_N is None else [(sampled_logp_N - self.stale_logp_N).exp()]
        if self.context is not None:
            dist.all_reduce(broken_3, op=dist.ReduceOp.MAX, group=self.context.group)
            seen_N = [overlap_N, event_N, weight_N, sampled_logp_N, divergence_N, *stale, *moved]
            whole = self.context.whole(seen_N, self.dtype)
            overlap_N, event_N, weight_N, sampled_logp_N, divergence_N, *others = whole
            stale, moved = list(others[: len(stale)]), list(others[len(stale) :])
            reliability_N, _ = running.advance(event_N)
        raise_if_broken(broken_3, vocab_size)
        ratio_N, clipped_N = moved or (None, None)
        return loss_sum.to(self.dtype), GateStats(
            overlap_N=overlap_N,
            event_N=event_N,
            reliability_N=reliability_N,
            weight_N=weight_N,
            sampled_logp_N=sampled_logp_N,
            divergence_N=divergence_N,
            reliable_length_B=running.reliable_length(reliability_N),
            length_B=running.length_B,
            ratio_N=ratio_N,
            clipped_N=clipped_N,
            policy=OldPolicy.joined(kept) if keep_policy else None,
            stale_ratio_N=stale[0] if stale else None,
            stale_clipped_N=(stale[0] - 1).abs() > self.objectives[0].clip if stale else None,
        )

    def _whole_response_weights(self) -> tuple[Tensor | None, Tensor | None]:
        """W [N] and the weighting's w [N], each if it needs more of the responses than what came before: an extra pass.

        W does where it is normalised by its mean, and where other ranks have a part of the responses.
        """
        mean = self.gate is not None and self.gate.weight_normalisation == "mean"
        gates, weighs = mean or self.context is not None, needs_whole_response(self.weighting)
        if not gates and not weighs:
            return None, None
        if self.gate is None and not weighs:
            return torch.ones(len(self.sampled_ids_N), dtype=self.dtype, device=self.device), None
        looks = [(seen.event_N, seen.signals) for seen in (self._look(part, whole=weighs) for part in self.chunks)]
        event_N, signals = torch.cat([event_N for event_N, _ in looks]), Signals.joined([part for _, part in looks])
        if self.context is not None:
            event_N, signals = self._of_all_ranks(event_N, signals)
        gate_N = weighting_N = None
        if gates:
            gate_N = self._mine(apply_gate_packed(event_N, self.offsets, self.gate, self.dtype).weight_BT)
        if weighs:
            weighting_N = self._mine(response_weights(self.weighting, signals, self.offsets).to(self.dtype))
        return gate_N, weighting_N

    def _of_all_ranks(self, event_N: Tensor, signals: Signals) -> tuple[Tensor, Signals]:
        """Events and signals of the whole batch, from those of this context-parallel rank."""
        assert self.context is not None
        advantage_N, *others = signals
        given = [signal_N for signal_N in others if signal_N is not None]
        event_N, advantage_N, *whole = self.context.whole([event_N, advantage_N, *given], self.dtype)
        return event_N, Signals(advantage_N, *(None if signal_N is None else whole.pop(0) for signal_N in others))

    def _mine(self, whole_N: Tensor) -> Tensor:
        """This rank's tokens of the whole batch's."""
        return whole_N if self.context is None else whole_N[self.context.index_N]

    def _look(self, part: slice, *, whole: bool = False, old: OldPolicy | None = None) -> Look:
        """whole: with the signals of a weighting that needs whole responses. old: look where it did."""
        sums = needs_vocabulary(self.weighting) and (whole or not needs_whole_response(self.weighting))
        return look(
            self.student,
            self.teacher,
            self.sampled_ids_N,
            part,
            self.gate,
            self.objectives,
            given=None if old is None or old.reward_NK is None else old.candidates,
            in_logs=sums or on_vocabulary(self.objectives[0]),
            sums=sums,
        )
