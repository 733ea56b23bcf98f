"""The method in its plainest form, for tests: full logits in float64, one Python loop over tokens, ordinary autograd.

Written from method.md §1 and §2 and not from the package: it shares no line with what it checks. Slow on purpose.
`Case` holds the inputs of one call, for the reference and for the fused loss.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from prune_opd.config import GateConfig, ObjectiveConfig, WeightingConfig
from prune_opd.loss import GateStats, Head, Method, Tokens, distill_loss
from prune_opd.loss.context import ContextShard
from prune_opd.method.calibration import Usual
from tests.reference_token import (
    as_one_end,
    credits_of,
    forward_kl,
    mismatch_factor,
    nucleus,
    outside_of,
    scaled,
    token_loss,
    top_ids,
    trust,
    with_one_end,
)
from tests.reference_update import reference_reward

VOCAB = 61
USUAL = Usual(0.75, 0.15, kl=0.75)  # acceptance, for gates that look for a change point
GATE = GateConfig(k=6, threshold=0.5, w_drop=0.15)
OBJECTIVE = ObjectiveConfig(k=6)
NO_WEIGHTING = WeightingConfig()
SUPPORTS = ("student", "teacher", "union", "intersection")
# Every objective, support, weight and tail of method.md §1 and §7.
OBJECTIVES = [
    *(
        ObjectiveConfig(k=6, support=support, weight=weight)
        for support in SUPPORTS
        for weight in ("student_p", "teacher_p", "none")
    ),
    *(ObjectiveConfig(k=6, support=support, tail="bucket") for support in SUPPORTS),
    *(ObjectiveConfig(k=6, support=support, tail="centred") for support in SUPPORTS),
    *(ObjectiveConfig(k=6, weight=weight, tail="centred") for weight in ("teacher_p", "none")),
    ObjectiveConfig("sampled_token", k=6),
    ObjectiveConfig("local_support_matching", k=6),
    ObjectiveConfig("topk_forward_kl", k=6),
    ObjectiveConfig("full_vocab_reverse_kl", k=6),
    ObjectiveConfig("full_vocab_jsd", k=6),
    ObjectiveConfig("full_vocab_jsd", k=6, beta=0.9),
    ObjectiveConfig("sampled_token", k=6, discount=0.9),
    ObjectiveConfig("sampled_token", k=6, baseline="reverse_kl"),
    ObjectiveConfig("sampled_token", k=6, baseline="reverse_kl", discount=0.9),
    ObjectiveConfig("sampled_k2", k=6),
    ObjectiveConfig("sampled_k2", k=6, logp_min=-4.0, loss_max=0.1),
    ObjectiveConfig("sampled_k3", k=6),
    ObjectiveConfig("sampled_k3", k=6, logp_min=-4.0, loss_max=0.1),
    ObjectiveConfig("topk_forward_kl", k=6, renormalise="none"),
    ObjectiveConfig("topk_forward_kl", k=6, renormalise="none", logp_min=-3.0, loss_max=0.3),
    ObjectiveConfig("topk_forward_kl", k=6, renormalise="both"),
    ObjectiveConfig("topk_mixed_kl", k=6, forward_share=0.3),
    ObjectiveConfig("topk_jsd", k=6, beta=0.3),
    ObjectiveConfig("priced_reverse_kl", k=6, outside_logp=-9.0),
    ObjectiveConfig("full_vocab_forward_kl", k=6),
    ObjectiveConfig("full_vocab_mixed_kl", k=6, forward_share=0.3),
]
WEIGHTINGS = [
    WeightingConfig("entropy_aware", entropy_threshold=1.5, forward_k=9),
    WeightingConfig("iw_opd"),
    WeightingConfig("tip", retain=0.4),
    WeightingConfig("sdar", sharpness=2.0),
    WeightingConfig("tropd", forward_k=9),
]


def describe(objective: ObjectiveConfig) -> str:
    """A name for a case."""
    details = {"topk_reverse_kl": f" {objective.support} {objective.weight}", "full_vocab_jsd": f" {objective.beta:g}"}
    tail = "" if objective.tail == "none" else f" {objective.tail}"
    tail += "" if objective.renormalise == "q" else f" renormalise {objective.renormalise}"
    tail += "" if objective.loss_max is None else " clamped"
    tail += " less its mean" * (objective.baseline != "none")
    tail += " discounted" * (objective.discount > 0) + " ends" * (objective.ends == "class")
    return objective.name + details.get(objective.name, "") + tail


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
    outside: dict[str, list[float]]  # what has no part in the loss, by its name in GateStats


def weighted(
    weighting: WeightingConfig,
    weights: list[float],
    cu_seqlens: Sequence[int],
    sampled_ids_N: Tensor,
    logp_NV: Tensor,
    logq_NV: Tensor,
) -> list[float]:
    """The gate's weights, times those of a published weighting."""
    factors = [1.0] * len(weights)
    for begin, end in pairwise(cu_seqlens):
        if weighting.name == "iw_opd":
            sizes = [abs(float(logq_NV[t, y] - logp_NV[t, y])) for t, y in enumerate(sampled_ids_N.tolist())][begin:end]
            for i in range(len(sizes)):
                factors[begin + i] = 1 + weighting.gamma * (1 - sum(sizes[:i]) / max(sum(sizes), 1e-8))
        if weighting.name in ("sdar", "tropd"):
            for t in range(begin, end):
                factors[t] = trust(weighting, float(logq_NV[t, sampled_ids_N[t]] - logp_NV[t, sampled_ids_N[t]]))
        if weighting.name == "tip" and end > begin:
            logp_TV, logq_TV = logp_NV[begin:end], logq_NV[begin:end]
            h = [-float((row.exp() * row).sum()) for row in logp_TV]
            d = [float((p.exp() * (p - q)).sum()) for p, q in zip(logp_TV, logq_TV, strict=True)]
            ordered = sorted(h)
            place = 0.98 * (len(h) - 1)
            low = math.floor(place)
            cut = ordered[low] + (place - low) * (ordered[min(low + 1, len(h) - 1)] - ordered[low])
            h, d = scaled([min(value, cut) for value in h]), scaled(d)
            score = [1 - (1 - a) * (1 - b) for a, b in zip(h, d, strict=True)]  # 1 where either is
            count = max(1, int(round(weighting.retain * len(score), 6)))
            kept = sorted(range(len(score)), key=lambda i: (-score[i], i))[:count]
            for i in range(len(score)):
                factors[begin + i] = len(score) / len(kept) if i in kept else 0.0
    return [weight * factor for weight, factor in zip(weights, factors, strict=True)]


def reference_loss(
    case: Case, gate: GateConfig | None, objective: ObjectiveConfig, weighting: WeightingConfig
) -> Reference:
    """What distill_loss must return, from whole (not sharded) weights."""
    sampled_ids_N, cu_seqlens, stale_logp_N = case.sampled, case.offsets, case.stale_logp

    def logits(hidden_NH: Tensor, weight_VH: Tensor) -> Tensor:
        return hidden_NH.double() @ weight_VH[: case.vocab_size].double().T

    student_NV = logits(case.student_hidden, case.student_weight) / objective.temperature
    teacher_NV = logits(case.teacher_hidden, case.teacher_weight).detach()
    teacher_NV = teacher_NV / (objective.teacher_temperature or objective.temperature)
    token_logp_N = student_NV.detach().log_softmax(-1).gather(1, sampled_ids_N[:, None])[:, 0]
    if objective.ends == "class":
        student_NV, teacher_NV = (with_one_end(whole_NV, case.terminal_ids) for whole_NV in (student_NV, teacher_NV))
        sampled_ids_N = as_one_end(sampled_ids_N, case.terminal_ids)
    logp_NV, logq_NV = student_NV.log_softmax(-1), teacher_NV.log_softmax(-1)

    overlap_k = objective.k if gate is None else gate.k
    overlaps, events, reliabilities, weights, reliable_lengths = [], [], [], [], []
    for begin, end in pairwise(cu_seqlens):
        count, row_weights, reliable, collected = 0, [], 0, 0.0
        kls: list[float] = []
        for t in range(begin, end):
            shared = len(set(top_ids(student_NV[t], overlap_k)) & set(top_ids(teacher_NV[t], overlap_k)))
            overlaps.append(shared / overlap_k)
            event = False
            if gate is not None and gate.metric == "overlap":
                event = shared < gate.threshold * gate.k - 1e-9
            elif gate is not None and gate.metric != "teacher_top_p":
                students, teachers = top_ids(student_NV[t], gate.k), top_ids(teacher_NV[t], gate.k)
                p_V, q_V = logp_NV[t].exp(), logq_NV[t].exp()
                accepted_mass = float(torch.minimum(p_V, q_V)[students].sum())
                if gate.metric == "acceptance":
                    event = accepted_mass < gate.threshold
                elif gate.metric == "kl_agreement":
                    kls.append(float((p_V * (logp_NV[t] - logq_NV[t])).sum()))
                    last = kls[-gate.low_tokens :]
                    event = len(last) == gate.low_tokens and sum(last) / len(last) < gate.threshold * USUAL.kl
                elif gate.metric == "change_point":
                    z = min((USUAL.mean - accepted_mass) / USUAL.deviation, 3.0)
                    collected = max(0.0, collected + z - gate.slack)
                    event = collected >= gate.alarm
                else:
                    event = float(p_V[sorted({*students} & {*teachers})].sum()) < gate.threshold
            elif gate is not None:
                accepted = nucleus(logq_NV[t], top_ids(teacher_NV[t], gate.k), gate.top_p)
                event = int(sampled_ids_N[t]) not in accepted
            events.append(event)
            count = count + event if gate is None or gate.memory else int(event)
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

    gate_weights = weights
    weights = weighted(weighting, gate_weights, cu_seqlens, sampled_ids_N, logp_NV.detach(), logq_NV)
    credits = credits_of(objective, weights, cu_seqlens, sampled_ids_N, logp_NV.detach(), logq_NV)
    if stale_logp_N is not None:
        for t in range(len(stale_logp_N)):
            if not math.isnan(stale_logp_N[t]):
                ratio = math.exp(float(token_logp_N[t]) - float(stale_logp_N[t]))
                factor = min(max(ratio, 1 - objective.clip), 1 + objective.clip)
                weights[t], gate_weights[t] = weights[t] * factor, gate_weights[t] * factor
                credits[t] *= factor
    engine = [math.nan] * len(sampled_ids_N) if case.engine_logp is None else case.engine_logp.tolist()
    chosen = zip(logp_NV.detach(), sampled_ids_N.tolist(), engine, strict=True)
    factors = [mismatch_factor(objective, of_engine, float(logp_V[y])) for logp_V, y, of_engine in chosen]
    loss_sum, divergences, outside = student_NV.sum() * 0, [], []
    for t, y in enumerate(sampled_ids_N.tolist()):
        with torch.no_grad():
            outside.append(outside_of(overlap_k, y, student_NV[t], teacher_NV[t], logp_NV[t], logq_NV[t]))
        surrogate, divergence = token_loss(objective, y, student_NV[t], teacher_NV[t], weights[t] * factors[t])
        if objective.discount:
            surrogate = -credits[t] * factors[t] * logp_NV[t, y]
        loss_sum = loss_sum + surrogate
        divergences.append(divergence.item())
        if weighting.name == "entropy_aware":
            entropy = -(logq_NV[t].exp() * logq_NV[t]).sum()
            if entropy > weighting.entropy_threshold:
                added = forward_kl(logp_NV[t], logq_NV[t], top_ids(teacher_NV[t], weighting.forward_k))
                loss_sum = loss_sum + gate_weights[t] * factors[t] * added
        if weighting.name == "tropd":
            added = forward_kl(logp_NV[t], logq_NV[t], top_ids(teacher_NV[t], weighting.forward_k))
            untrusted = 1 - trust(weighting, float(logq_NV[t, y] - logp_NV[t, y].detach()))
            loss_sum = loss_sum + gate_weights[t] * untrusted * factors[t] * added
    if case.advantage is not None:
        loss_sum = loss_sum + reference_reward(case, case, objective)
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
        outside={name: [of_token[name] for of_token in outside] for name in (outside[0] if outside else {})},
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
    stale_logp: Tensor | None = None
    engine_logp: Tensor | None = None
    advantage: Tensor | None = None
    terminal_ids: tuple[int, ...] = ()

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
        self,
        gate: GateConfig | None = GATE,
        objective: ObjectiveConfig = OBJECTIVE,
        weighting: WeightingConfig = NO_WEIGHTING,
        context: ContextShard | None = None,
        **options: Any,
    ) -> tuple[Tensor, int, GateStats]:
        offsets = torch.tensor(self.offsets, dtype=torch.int32)
        return distill_loss(
            Head(self.student_hidden, self.student_weight),
            Head(self.teacher_hidden, self.teacher_weight),
            Tokens(self.sampled, offsets, self.vocab_size, context, self.stale_logp, self.engine_logp, self.advantage),
            Method(gate, objective, weighting, USUAL, self.terminal_ids),
            **options,
        )

    def reference(
        self,
        gate: GateConfig | None = GATE,
        objective: ObjectiveConfig = OBJECTIVE,
        weighting: WeightingConfig = NO_WEIGHTING,
    ) -> Reference:
        return reference_loss(self, gate, objective, weighting)

    def rewarded(self) -> Case:
        """The same tokens, whose responses have a task's rewards: an advantage each, of either sign."""
        draw = torch.Generator().manual_seed(11)
        advantage_B = torch.randn(len(self.offsets) - 1, generator=draw, dtype=torch.float64)
        return dataclasses.replace(self, advantage=advantage_B.repeat_interleave(torch.tensor(self.offsets).diff()))

    def moved(self, distance: float = 0.2) -> Case:
        """The same tokens, with a student that has been updated since."""
        generator = torch.Generator().manual_seed(7)

        def move(tensor: Tensor) -> Tensor:
            step = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
            return tensor.detach() + (distance * step).to(tensor.dtype)

        return dataclasses.replace(
            self, student_hidden=move(self.student_hidden), student_weight=move(self.student_weight)
        )

    def stale(self, distance: float = 0.4) -> Case:
        """The same tokens, of which the first third of each response is from a student of before."""
        then_N = self._another(distance, seed=9)
        for begin, end in pairwise(self.offsets):
            then_N[begin + (end - begin + 2) // 3 : end] = math.nan
        return dataclasses.replace(self, stale_logp=then_N)

    def mismatched(self, distance: float = 1.0) -> Case:
        """The same tokens, from an engine whose probabilities are others; what is stale is not known of it."""
        engine_N = self._another(distance, seed=10)
        if self.stale_logp is not None:
            engine_N[~self.stale_logp.isnan()] = math.nan
        return dataclasses.replace(self, engine_logp=engine_N)

    def _another(self, distance: float, seed: int) -> Tensor:
        """Log-probabilities of the sampled tokens, off the student's by this much."""
        draw = torch.Generator().manual_seed(seed)
        logits_NV = self.student_hidden.detach().double() @ self.student_weight.detach()[: self.vocab_size].double().T
        now_N = logits_NV.log_softmax(-1).gather(1, self.sampled[:, None])[:, 0]
        return now_N + distance * torch.randn(len(now_N), generator=draw, dtype=torch.float64)

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
