"""The method in its plainest form, for tests: full logits in float64, one Python loop over tokens, ordinary autograd.

Written from method.md §1 and §2 and not from the package: it shares no line with what it checks. Slow on purpose.
`Case` holds the inputs of one call, for the reference and for the fused loss.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from prune_opd.config import GateConfig, ObjectiveConfig
from prune_opd.fused_loss import GateStats, distill_loss

VOCAB = 61
GATE = GateConfig(k=6, threshold=0.5, w_drop=0.15)
OBJECTIVE = ObjectiveConfig(k=6)


class Reference(NamedTuple):
    loss_sum: Tensor  # float64, with a graph to the student's hidden states and output weight
    overlap: list[float]
    event: list[bool]
    reliability: list[float]
    weight: list[float]
    sampled_logp: list[float]
    divergence: list[float]
    reliable_length: list[int]
    length: list[int]


def top_ids(logits_V: Tensor, k: int) -> list[int]:
    """The k best ids of one token, ties to the lower id."""
    values = logits_V.tolist()
    return sorted(range(len(values)), key=lambda v: (-values[v], v))[:k]


def nucleus(logp_V: Tensor, ids: list[int], p: float) -> set[int]:
    """ids in descending order up to and including the first whose cumulative probability reaches p."""
    accepted, total = set(), 0.0
    for v in ids:
        accepted.add(v)
        total += float(logp_V[v].exp())
        if total >= p:
            break
    return accepted


def reference_loss(
    student_hidden_NH: Tensor,
    student_weight_VH: Tensor,
    teacher_hidden_NH: Tensor,
    teacher_weight_VH: Tensor,
    sampled_ids_N: Tensor,
    cu_seqlens: Sequence[int],
    gate: GateConfig | None,
    objective: ObjectiveConfig,
    vocab_size: int,
) -> Reference:
    """What distill_loss must return, from whole (not sharded) weights."""

    def logits(hidden_NH: Tensor, weight_VH: Tensor) -> Tensor:
        return hidden_NH.double() @ weight_VH[:vocab_size].double().T / objective.temperature

    student_NV = logits(student_hidden_NH, student_weight_VH)
    teacher_NV = logits(teacher_hidden_NH, teacher_weight_VH).detach()
    logp_NV, logq_NV = student_NV.log_softmax(-1), teacher_NV.log_softmax(-1)

    overlap_k = objective.k if gate is None else gate.k
    overlaps, events, reliabilities, weights, reliable_lengths = [], [], [], [], []
    for begin, end in pairwise(cu_seqlens):
        count, row_weights, reliable = 0, [], 0
        for t in range(begin, end):
            shared = len(set(top_ids(student_NV[t], overlap_k)) & set(top_ids(teacher_NV[t], overlap_k)))
            overlaps.append(shared / overlap_k)
            event = False
            if gate is not None and gate.metric == "overlap":
                event = shared < gate.threshold * gate.k - 1e-9
            elif gate is not None:
                accepted = nucleus(logq_NV[t], top_ids(teacher_NV[t], gate.k), gate.top_p)
                event = int(sampled_ids_N[t]) not in accepted
            events.append(event)
            count += event
            reliability = 1.0 if gate is None else max(0.0, round(1 - gate.w_drop * count, 12))
            reliabilities.append(reliability)
            reliable += reliability > 1e-8
            row_weights.append(1.0 if gate is None else reliability + gate.w_base)
        divisor = 1.0
        if gate is not None and gate.weight_normalisation == "base":
            divisor = 1 + gate.w_base
        elif gate is not None and gate.weight_normalisation == "mean" and sum(row_weights) > 0:
            divisor = sum(row_weights) / len(row_weights)
        weights += [weight / divisor for weight in row_weights]
        reliable_lengths.append(reliable)

    loss_sum, divergences = student_NV.sum() * 0, []
    for t in range(len(sampled_ids_N)):
        support = top_ids(student_NV[t], objective.k)
        logp_K = logp_NV[t, support]
        share_K = (logp_K.exp() / logp_K.exp().sum()).detach()
        reward_K = -weights[t] * share_K * (logp_K.detach() - logq_NV[t, support])
        loss_sum = loss_sum - (reward_K * logp_K).sum()
        divergences.append((share_K * (logp_K - logq_NV[t, support])).sum().item())
    return Reference(
        loss_sum=loss_sum,
        overlap=overlaps,
        event=events,
        reliability=reliabilities,
        weight=weights,
        sampled_logp=[logp_NV[t, y].item() for t, y in enumerate(sampled_ids_N.tolist())],
        divergence=divergences,
        reliable_length=reliable_lengths,
        length=[end - begin for begin, end in pairwise(cu_seqlens)],
    )


@dataclasses.dataclass
class Case:
    """Inputs of one call, on one rank."""

    student_hidden: Tensor
    student_weight: Tensor
    teacher_hidden: Tensor
    teacher_weight: Tensor
    sampled: Tensor
    offsets: list[int]
    vocab_size: int = VOCAB

    def leaves(self, dtype: torch.dtype) -> Case:
        """A copy in `dtype` whose student tensors want a gradient."""
        return dataclasses.replace(
            self,
            student_hidden=self.student_hidden.detach().to(dtype, copy=True).requires_grad_(),
            student_weight=self.student_weight.detach().to(dtype, copy=True).requires_grad_(),
            teacher_hidden=self.teacher_hidden.to(dtype),
            teacher_weight=self.teacher_weight.to(dtype),
        )

    def fused(
        self, gate: GateConfig | None = GATE, objective: ObjectiveConfig = OBJECTIVE, **more: Any
    ) -> tuple[Tensor, int, GateStats]:
        return distill_loss(
            self.student_hidden,
            self.student_weight,
            self.teacher_hidden,
            self.teacher_weight,
            self.sampled,
            torch.tensor(self.offsets, dtype=torch.int32),
            gate,
            objective,
            **{"vocab_size": self.vocab_size, **more},
        )

    def reference(self, gate: GateConfig | None = GATE, objective: ObjectiveConfig = OBJECTIVE) -> Reference:
        return reference_loss(
            self.student_hidden,
            self.student_weight,
            self.teacher_hidden,
            self.teacher_weight,
            self.sampled,
            self.offsets,
            gate,
            objective,
            self.vocab_size,
        )

    def gradients(self) -> tuple[Tensor, Tensor]:
        """Of the student's hidden states and output weight, after a backward."""
        hidden, weight = self.student_hidden.grad, self.student_weight.grad
        assert hidden is not None and weight is not None
        return hidden, weight


def make_case(lengths: tuple[int, ...] = (9, 0, 1, 14, 0), seed: int = 0) -> Case:
    """Random models that drift apart along the tokens, of different hidden size and different vocabulary padding."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    tokens, hidden = sum(lengths), 8
    student_hidden, student_weight = normal(tokens, hidden), normal(VOCAB + 3, hidden)
    drift = torch.linspace(0.1, 1.0, tokens, dtype=torch.float64)[:, None] * normal(tokens, 4)
    teacher_weight = normal(VOCAB + 7, hidden + 4)
    teacher_weight[:VOCAB, :hidden] = student_weight[:VOCAB]
    return Case(
        student_hidden=student_hidden,
        student_weight=student_weight,
        teacher_hidden=torch.cat([student_hidden, drift], 1),
        teacher_weight=teacher_weight,
        sampled=torch.randint(VOCAB, (tokens,), generator=generator),
        offsets=[0, *torch.tensor(lengths).cumsum(0).tolist()],
    )
