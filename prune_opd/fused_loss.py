"""The loss: gated on-policy distillation from hidden states, in chunks of tokens (Prune-OPD, method.md §1 and §2).

One pass over the packed response tokens, in order. Of a chunk of n tokens, on every rank of the tensor-parallel group:

    student hidden ─ @ student weight shard ─▶ logits [n, V/tp] ─┬─▶ top-k ids ──┐
    teacher hidden ─ @ teacher weight shard ─▶ logits [n, V/tp] ─┼─▶ top-k ids ──┤  one all-gather
                                                                 │               ├─▶ overlap O ─▶ event B
                                                                 │   support ids ┘             │
                     log p_j, log q_j on the support, log p(y) ◀─┘  one all-reduce             ▼
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
The exception is `weight_normalisation = mean`, which needs a response's weights first and takes a pass for the events.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from prune_opd.config import GateConfig, ObjectiveConfig
from prune_opd.errors import ConfigError
from prune_opd.gate import PackedGate, apply_gate_packed, overlap_events, overlap_ratio, top_p_reject
from prune_opd.objective import support_ids, token_loss
from prune_opd.vocab_parallel import (
    OutputHead,
    exp_sum_,
    group_size,
    local_columns,
    local_gather,
    sum_together,
    topk_together,
)


@dataclass(frozen=True)
class GateStats:
    """What the loss saw, detached: N packed tokens (fp32; fp64 for fp64 inputs) and B responses."""

    overlap_N: Tensor  # O, always fp32; measured with objective.k where there is no gate
    event_N: Tensor  # B, bool
    reliability_N: Tensor  # R
    weight_N: Tensor  # W
    sampled_logp_N: Tensor  # student's log p(y_t)
    divergence_N: Tensor  # of the objective, on its support, before any weight [nats]
    reliable_length_B: Tensor  # E, int64
    length_B: Tensor  # int64


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

    Returns (loss_sum, token_count, stats): loss_sum fp32 (fp64 for fp64 inputs) and token_count = N. Logits are taken
    to fp32 before any statistic, whatever the inputs' dtype. ConfigError for a setting, ValueError for a tensor that
    does not fit, both before anything is computed; ValueError after it for hidden states whose logits are not finite
    and for sampled ids outside the vocabulary.
    """
    want_gradients = torch.is_grad_enabled() and (student_hidden_NH.requires_grad or student_weight_VH.requires_grad)
    student = OutputHead("student", student_hidden_NH, student_weight_VH, objective.temperature, vocab_size, tp_group)
    teacher = OutputHead("teacher", teacher_hidden_NH, teacher_weight_VH, objective.temperature, vocab_size, tp_group)
    offsets = _check(student, teacher, sampled_ids_N, cu_seqlens, gate, objective, chunk)
    with torch.no_grad():
        loss_sum, grad_hidden_NH, grad_weight_VH, stats = _run(
            student,
            teacher,
            sampled_ids_N,
            offsets,
            gate,
            objective,
            chunk,
            want_hidden=want_gradients and student_hidden_NH.requires_grad,
            want_weight=want_gradients and student_weight_VH.requires_grad,
        )
    if want_gradients:
        loss_sum = _WithGradients.apply(student_hidden_NH, student_weight_VH, loss_sum, grad_hidden_NH, grad_weight_VH)
    return loss_sum, len(sampled_ids_N), stats


def _run(
    student: OutputHead,
    teacher: OutputHead,
    sampled_ids_N: Tensor,
    offsets: list[int],
    gate: GateConfig | None,
    objective: ObjectiveConfig,
    chunk: int,
    want_hidden: bool,
    want_weight: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None, GateStats]:
    """Loss sum, its gradients (None where not wanted) and statistics: the loop over the chunks."""
    tokens, device = len(sampled_ids_N), sampled_ids_N.device
    dtype = torch.promote_types(torch.promote_types(student.dtype, teacher.dtype), torch.float32)
    chunks = [slice(begin, min(begin + chunk, tokens)) for begin in range(0, tokens, chunk)]
    student.allocate(min(chunk, tokens), dtype)
    teacher.allocate(min(chunk, tokens), dtype)
    gradients = _Gradients(student, want_hidden, want_weight)
    running = PackedGate(offsets, gate, device, dtype)

    whole_weight_N = None
    if gate is not None and gate.weight_normalisation == "mean":
        events = [_look(student, teacher, sampled_ids_N, part, gate, objective).event_N for part in chunks]
        event_N = torch.cat([torch.empty(0, dtype=torch.bool, device=device), *events])
        whole_weight_N = apply_gate_packed(event_N, offsets, gate, dtype).weight_BT

    overlap_N = torch.empty(tokens, dtype=torch.float32, device=device)
    event_N = torch.empty(tokens, dtype=torch.bool, device=device)
    reliability_N, weight_N, sampled_logp_N, divergence_N = torch.empty(4, tokens, dtype=dtype, device=device).unbind()
    loss_sum = torch.zeros((), dtype=torch.float64, device=device)
    finite_2 = torch.ones(2, dtype=torch.bool, device=device)
    for part in chunks:
        look = _look(student, teacher, sampled_ids_N, part, gate, objective)
        overlap_N[part], event_N[part], sampled_logp_N[part] = look.overlap_N, look.event_N, look.sampled_logp_N
        reliability_N[part], weight_N[part] = running.advance(look.event_N)
        if whole_weight_N is not None:
            weight_N[part] = whole_weight_N[part]
        loss = token_loss(objective, look.student_logp_NK, look.teacher_logp_NK, weight_N[part])
        loss_sum += loss.loss_N.sum()
        divergence_N[part] = loss.divergence_N
        finite_2 &= look.finite_2
        gradients.add(part, look, loss.grad_logp_NK)

    outside = ((sampled_ids_N < 0) | (sampled_ids_N >= student.shard.vocab_size)).any()
    _raise_if_broken(torch.cat([~finite_2, outside[None]]), student.shard.vocab_size)
    grad_hidden_NH, grad_weight_VH = gradients.finish()
    stats = GateStats(
        overlap_N=overlap_N,
        event_N=event_N,
        reliability_N=reliability_N,
        weight_N=weight_N,
        sampled_logp_N=sampled_logp_N,
        divergence_N=divergence_N,
        reliable_length_B=running.reliable_length(reliability_N),
        length_B=running.length_B,
    )
    return loss_sum.to(dtype), grad_hidden_NH, grad_weight_VH, stats


# ---------------------------------------------------------------------------------------------------- one chunk


class _Look(NamedTuple):
    """One chunk as both models see it. Log-probabilities are over the full vocabulary and the same on every rank."""

    overlap_N: Tensor
    event_N: Tensor
    sampled_logp_N: Tensor
    support_NK: Tensor
    student_logp_NK: Tensor  # on the support
    teacher_logp_NK: Tensor
    student_exp_NV: Tensor  # exp(logit − max) of this rank's columns: p_v times student_total. In the student's buffer
    student_total_N1: Tensor
    finite_2: Tensor  # whether the student's and the teacher's normalisers are numbers


def _look(
    student: OutputHead,
    teacher: OutputHead,
    sampled_ids_N: Tensor,
    part: slice,
    gate: GateConfig | None,
    objective: ObjectiveConfig,
) -> _Look:
    sampled_N = sampled_ids_N[part]
    gate_k = objective.k if gate is None else gate.k
    student_logits_NV, teacher_logits_NV = student.logits(part), teacher.logits(part)
    student_top, teacher_top = topk_together(
        (student_logits_NV, teacher_logits_NV), max(gate_k, objective.k), (student.shard, teacher.shard)
    )
    support_NK = support_ids(objective, sampled_N, student_top.ids_NK, teacher_top.ids_NK)

    # All is read off the logits before they turn, in place, into the terms of Σ exp. A top-k's first is the maximum.
    student_at_NK = local_gather(student_logits_NV, support_NK, student.shard)
    teacher_at_NK = local_gather(teacher_logits_NV, support_NK, teacher.shard)
    sampled_at_N1 = local_gather(student_logits_NV, sampled_N[:, None], student.shard)
    student_max_N1, teacher_max_N1 = student_top.values_NK[:, :1], teacher_top.values_NK[:, :1]
    student_at_NK, teacher_at_NK, sampled_at_N1, student_total_N1, teacher_total_N1 = sum_together(
        (
            student_at_NK,
            teacher_at_NK,
            sampled_at_N1,
            exp_sum_(student_logits_NV, student_max_N1),
            exp_sum_(teacher_logits_NV, teacher_max_N1),
        ),
        student.shard.group,
    )
    # logit − max − log Σ: with max + log Σ as one number, large logits would cost digits of small log-probabilities.
    student_log_N1, teacher_log_N1 = student_total_N1.log(), teacher_total_N1.log()

    overlap_N = overlap_ratio(student_top.ids_NK[:, :gate_k], teacher_top.ids_NK[:, :gate_k])
    if gate is None:
        event_N = torch.zeros_like(sampled_N, dtype=torch.bool)
    elif gate.metric == "overlap":
        event_N = overlap_events(overlap_N, gate.k, gate.threshold)
    else:
        teacher_top_logp_NK = teacher_top.values_NK[:, :gate_k] - teacher_max_N1 - teacher_log_N1
        event_N = top_p_reject(sampled_N, teacher_top.ids_NK[:, :gate_k], teacher_top_logp_NK, gate.top_p)
    return _Look(
        overlap_N=overlap_N,
        event_N=event_N,
        sampled_logp_N=(sampled_at_N1 - student_max_N1 - student_log_N1).squeeze(1),
        support_NK=support_NK,
        student_logp_NK=student_at_NK - student_max_N1 - student_log_N1,
        teacher_logp_NK=teacher_at_NK - teacher_max_N1 - teacher_log_N1,
        student_exp_NV=student_logits_NV,
        student_total_N1=student_total_N1,
        finite_2=torch.cat([student_log_N1, teacher_log_N1], dim=1).isfinite().all(dim=0),
    )


class _Gradients:
    """The student's two gradients, added up chunk by chunk."""

    def __init__(self, student: OutputHead, want_hidden: bool, want_weight: bool) -> None:
        self._student = student
        self._hidden_NH = torch.empty_like(student.hidden_NH) if want_hidden else None
        # At least fp32: in bf16 the sum over many chunks would lose the small ones.
        dtype = torch.promote_types(student.dtype, torch.float32)
        self._weight_VH = torch.zeros_like(student.weight_VH, dtype=dtype) if want_weight else None

    def add(self, part: slice, look: _Look, grad_logp_NK: Tensor) -> None:
        """From c_j = ∂ℓ/∂log p_j to ∂ℓ/∂logit_v = (c_v − p_v Σ_j c_j) / temperature, and on to hidden and weight."""
        if self._hidden_NH is None and self._weight_VH is None:
            return
        student = self._student
        coefficient_NK = grad_logp_NK / student.temperature
        column_NK, mine_NK = local_columns(look.support_NK, student.shard)
        scale_N1 = -coefficient_NK.sum(dim=1, keepdim=True) / look.student_total_N1
        grad_logits_NV = look.student_exp_NV.mul_(scale_N1)
        grad_logits_NV.scatter_add_(1, column_NK, coefficient_NK.masked_fill(~mine_NK, 0))
        grad_logits_NV = grad_logits_NV.to(student.dtype)
        if self._hidden_NH is not None:
            torch.mm(grad_logits_NV, student.weight_VH, out=self._hidden_NH[part])
        if self._weight_VH is not None:
            if self._weight_VH.dtype == student.dtype:
                self._weight_VH.addmm_(grad_logits_NV.t(), student.hidden_NH[part])
            else:
                self._weight_VH += grad_logits_NV.t() @ student.hidden_NH[part]

    def finish(self) -> tuple[Tensor | None, Tensor | None]:
        """Hidden gradient, complete on every rank, and this rank's weight gradient, in the inputs' dtype."""
        student = self._student
        if self._hidden_NH is not None and group_size(student.shard.group) > 1:
            # Each rank has gone through its own columns of the vocabulary only.
            dist.all_reduce(self._hidden_NH, group=student.shard.group)
        weight_VH = self._weight_VH.to(student.dtype) if self._weight_VH is not None else None
        return self._hidden_NH, weight_VH


class _WithGradients(torch.autograd.Function):
    """Gives a loss the gradients that were formed with it."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_NH: Tensor,
        weight_VH: Tensor,
        loss_sum: Tensor,
        grad_hidden_NH: Tensor | None,
        grad_weight_VH: Tensor | None,
    ) -> Tensor:
        ctx.save_for_backward(grad_hidden_NH, grad_weight_VH)
        return loss_sum.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden_NH, grad_weight_VH = ctx.saved_tensors
        return (
            grad_loss * grad_hidden_NH if ctx.needs_input_grad[0] else None,
            grad_loss * grad_weight_VH if ctx.needs_input_grad[1] else None,
            None,
            None,
            None,
        )


# ---------------------------------------------------------------------------------------------------- bad input


def _check(
    student: OutputHead,
    teacher: OutputHead,
    sampled_ids_N: Tensor,
    cu_seqlens: Tensor | Sequence[int],
    gate: GateConfig | None,
    objective: ObjectiveConfig,
    chunk: int,
) -> list[int]:
    """The offsets on the host, or one error that names what does not fit."""
    if chunk < 1:
        raise ConfigError(f"chunk = {chunk} is out of range: give the tokens to work on at a time, at least 1")
    vocab_size = student.shard.vocab_size
    for name, k in (("objective.k", objective.k), ("gate.k", gate.k if gate is not None else 1)):
        if k > vocab_size:
            raise ConfigError(
                f"{name} = {k} is larger than vocab_size = {vocab_size}: there are not so many candidates"
            )
    tokens = len(student.hidden_NH)
    if len(teacher.hidden_NH) != tokens:
        raise ValueError(
            f"teacher_hidden has {len(teacher.hidden_NH)} tokens and student_hidden {tokens}: "
            "both models must have seen the same packed response tokens"
        )
    if sampled_ids_N.shape != (tokens,) or sampled_ids_N.is_floating_point():
        raise ValueError(
            f"sampled_ids is {sampled_ids_N.dtype} {list(sampled_ids_N.shape)}: "
            f"one integer id per token of student_hidden is needed, [{tokens}]"
        )
    offsets = cu_seqlens.tolist() if isinstance(cu_seqlens, Tensor) else list(cu_seqlens)
    if not isinstance(offsets, list) or not offsets or not all(isinstance(offset, int) for offset in offsets):
        raise ValueError(f"cu_seqlens = {offsets!r}: a flat list of whole numbers is needed, from 0 to {tokens}")
    if offsets[0] != 0 or offsets[-1] != tokens:
        raise ValueError(
            f"cu_seqlens runs from {offsets[0]} to {offsets[-1]}: "
            f"it must cover the tokens of student_hidden, 0 to {tokens}"
        )
    if any(after < before for before, after in pairwise(offsets)):
        raise ValueError(
            f"cu_seqlens = {offsets} decreases: the offset of a response is never below that of the one before"
        )
    return offsets


def _raise_if_broken(broken_3: Tensor, vocab_size: int) -> None:
    """One wait for the whole call. All ranks of a group have the same numbers, and so raise together."""
    student, teacher, outside = broken_3.tolist()
    for name, broken in (("student", student), ("teacher", teacher)):
        if broken:
            raise ValueError(
                f"{name}_hidden gives logits that are not finite: "
                f"look for NaN or infinity in the {name}'s hidden states and output weight"
            )
    if outside:
        raise ValueError(
            f"sampled_ids has an id outside 0..{vocab_size - 1}: student, teacher and rollout need one vocabulary"
        )
