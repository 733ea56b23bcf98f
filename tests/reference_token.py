"""One token's loss and statistics in their plainest form, for tests/reference.py: float64, ordinary autograd."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from prune_opd.config import ObjectiveConfig, WeightingConfig


def top_ids(logits_V: Tensor, k: int) -> list[int]:
    """The k best ids of one token, ties to the lower id."""
    values = logits_V.tolist()
    least = sorted(values, reverse=True)[:k][-1]
    among = [v for v, value in enumerate(values) if value >= least]
    return sorted(among, key=lambda v: (-values[v], v))[:k]


def with_one_end(logits_NV: Tensor, ids: Sequence[int]) -> Tensor:
    """A smaller vocabulary: the lowest of `ids` with the mass of them all, the others taken out."""
    kept = [v for v in range(logits_NV.shape[1]) if v not in ids[1:]]
    one_N = logits_NV[:, list(ids)].exp().sum(1).log()
    return torch.stack([one_N if v == ids[0] else logits_NV[:, v] for v in kept], dim=1)


def as_one_end(sampled_N: Tensor, ids: Sequence[int]) -> Tensor:
    """Sampled ids in that vocabulary."""
    ours = [ids[0] if y in ids else y for y in sampled_N.tolist()]
    return torch.tensor([y - sum(v < y for v in ids[1:]) for y in ours], dtype=torch.int64)


def scaled(values: list[float]) -> list[float]:
    """Onto 0..1."""
    low, high = min(values), max(values)
    return [(value - low) / (high - low) if high > low else 0.0 for value in values]


def nucleus(logp_V: Tensor, ids: list[int], p: float) -> set[int]:
    """ids in descending order up to and including the first whose cumulative probability reaches p."""
    accepted, total = set(), 0.0
    for v in ids:
        accepted.add(v)
        total += float(logp_V[v].exp())
        if total >= p:
            break
    return accepted


def trust(weighting: WeightingConfig, gap: float) -> float:
    """What sdar and tropd make of log q(y) − log p(y)."""
    return 1 / (1 + math.exp(-weighting.sharpness * gap)) if weighting.name == "sdar" else min(math.exp(gap), 1.0)


def forward_kl(logp_V: Tensor, logq_V: Tensor, ids: list[int]) -> Tensor:
    q = logq_V[ids].exp()
    q = q / q.sum()
    return (q * (q.log() - logp_V[ids])).sum()


def clamped(logs: Tensor, least: float | None) -> Tensor:
    return logs if least is None else logs.clamp(min=least)


def mixed(log_p: Tensor, log_q: Tensor, forward_share: float) -> Tensor:
    forward, reverse = (log_q.exp() * (log_q - log_p)).sum(), (log_p.exp() * (log_p - log_q)).sum()
    return forward_share * forward + (1 - forward_share) * reverse


def jsd(p: Tensor, q: Tensor, beta: float) -> Tensor:
    m = beta * q + (1 - beta) * p
    return beta * (q * (q / m).log()).sum() + (1 - beta) * (p * (p / m).log()).sum()


def topk_forward(objective: ObjectiveConfig, log_p: Tensor, log_q: Tensor) -> Tensor:
    """log_p, log_q: at the teacher's top-k."""
    log_p, log_q = (clamped(logs, objective.logp_min) for logs in (log_p, log_q))
    if objective.renormalise == "both":
        log_p = (log_p.exp() / log_p.exp().sum()).log()
    if objective.renormalise != "none":
        log_q = (log_q.exp() / log_q.exp().sum()).log()
    return (log_q.exp() * (log_q - log_p)).sum()


def support_of(objective: ObjectiveConfig, student_V: Tensor, teacher_V: Tensor) -> list[int]:
    students, teachers = top_ids(student_V, objective.k), top_ids(teacher_V, objective.k)
    return {
        "student": students,
        "teacher": teachers,
        "union": sorted({*students, *teachers}),
        "intersection": sorted({*students} & {*teachers}),
    }[objective.support]


def token_loss(
    objective: ObjectiveConfig, sampled: int, student_V: Tensor, teacher_V: Tensor, weight: float
) -> tuple[Tensor, Tensor]:
    """One token's loss, whose ordinary autograd is the wanted gradient, and the divergence that it is about."""
    logp_V, logq_V = student_V.log_softmax(-1), teacher_V.log_softmax(-1)
    p_V, q_V = logp_V.exp(), logq_V.exp()
    teachers = top_ids(teacher_V, objective.k)
    if objective.name == "topk_reverse_kl":
        ids = support_of(objective, student_V, teacher_V)
        if not ids:
            return student_V.sum() * 0, torch.zeros(())
        share_K = {
            "student_p": p_V[ids] / p_V[ids].sum(),
            "teacher_p": q_V[ids] / q_V[ids].sum(),
            "none": torch.ones(len(ids), dtype=torch.float64) / len(ids),
        }[objective.weight]
        gap_K = logp_V[ids] - logq_V[ids]
        if objective.tail != "none":
            return tailed_loss(objective, ids, p_V, q_V, weight)
        reward_K = (-weight * share_K * gap_K).detach()
        return -(reward_K * logp_V[ids]).sum(), (share_K * gap_K).sum()
    if objective.name == "sampled_token":
        gap = logp_V[sampled] - logq_V[sampled]
        mean = (p_V * (logp_V - logq_V)).sum() if objective.baseline == "reverse_kl" else torch.zeros(())
        return weight * (gap - mean).detach() * logp_V[sampled], gap
    if objective.name == "local_support_matching":
        p_K, q_K = p_V[teachers] / p_V[teachers].sum(), q_V[teachers] / q_V[teachers].sum()
        value = (p_K * (p_K / q_K).log()).sum()
    elif objective.name == "topk_forward_kl":
        value = topk_forward(objective, logp_V[teachers], logq_V[teachers])
    elif objective.name == "topk_mixed_kl":
        at_K = logp_V[teachers].log_softmax(-1), logq_V[teachers].log_softmax(-1)
        value = mixed(*at_K, objective.forward_share)
    elif objective.name == "topk_jsd":
        value = jsd(p_V[teachers] / p_V[teachers].sum(), q_V[teachers] / q_V[teachers].sum(), objective.beta)
    elif objective.name == "priced_reverse_kl":
        priced_V = torch.full_like(logq_V, objective.outside_logp)
        priced_V[teachers] = (q_V[teachers] / q_V[teachers].sum()).log()
        value = (p_V * (logp_V - priced_V)).sum()
    elif objective.name in ("sampled_k2", "sampled_k3"):
        gap = clamped(logp_V[sampled], objective.logp_min) - clamped(logq_V[sampled], objective.logp_min)
        value = gap**2 / 2 if objective.name == "sampled_k2" else (-gap).exp() + gap - 1
    elif objective.name == "full_vocab_reverse_kl":
        value = (p_V * (logp_V - logq_V)).sum()
    elif objective.name == "full_vocab_forward_kl":
        value = (q_V * (logq_V - logp_V)).sum()
    elif objective.name == "full_vocab_mixed_kl":
        value = mixed(logp_V, logq_V, objective.forward_share)
    elif objective.name == "full_vocab_jsd":
        value = jsd(p_V, q_V, objective.beta)
    else:
        raise AssertionError(objective.name)
    if objective.loss_max is not None:
        value = value.clamp(-objective.loss_max, objective.loss_max)
    return weight * value, value


def tailed_loss(
    objective: ObjectiveConfig, ids: list[int], p_V: Tensor, q_V: Tensor, weight: float
) -> tuple[Tensor, Tensor]:
    """As `token_loss`: its value is −Σ r log p, its gradient autograd's of the divergence that the tail makes exact."""
    rest = [v for v in range(len(p_V)) if v not in ids]
    p_K, q_K = p_V[ids], q_V[ids]
    share_K = {"student_p": p_K / p_K.sum(), "teacher_p": q_K / q_K.sum(), "none": torch.ones_like(p_K) / len(ids)}[
        objective.weight
    ]
    if objective.tail == "bucket":
        share_K, exact = p_K, (p_K * (p_K / q_K).log()).sum()
        baseline = torch.zeros((), dtype=torch.float64)
        if rest:
            baseline = (p_V[rest].sum() / q_V[rest].sum()).log()
            exact = exact + p_V[rest].sum() * baseline
    else:
        p_bar_K, q_bar_K = p_K / p_K.sum(), q_K / q_K.sum()
        exact = (share_K * (p_bar_K / q_bar_K).log()).sum()
        baseline = (share_K * (p_K / q_K).log()).sum() / share_K.sum()
    slope_K = (weight * share_K * ((p_K / q_K).log() - baseline)).detach()
    if objective.weight != "student_p":  # no divergence has these slopes as its gradient
        return (slope_K * p_K.log()).sum(), exact
    return (slope_K * p_K.log()).sum().detach() + weight * (exact - exact.detach()), exact


def outside_of(
    gate_k: int, sampled: int, student_V: Tensor, teacher_V: Tensor, logp_V: Tensor, logq_V: Tensor
) -> dict[str, float]:
    """What is said about a token beside the loss."""
    ids = top_ids(student_V, gate_k)
    p_V, q_V = logp_V.exp(), logq_V.exp()
    return {
        "reverse_kl_N": float((p_V * (logp_V - logq_V)).sum()),
        "student_entropy_N": -float((p_V * logp_V).sum()),
        "teacher_entropy_N": -float((q_V * logq_V).sum()),
        "student_mass_N": float(p_V[ids].sum()),
        "teacher_mass_N": float(q_V[ids].sum()),
        "acceptance_N": sum(min(float(p_V[v]), float(q_V[v])) for v in ids),
        "teacher_logp_N": float(logq_V[sampled]),
    }


def credits_of(
    objective: ObjectiveConfig,
    weights: list[float],
    cu_seqlens: Sequence[int],
    sampled_ids_N: Tensor,
    logp_NV: Tensor,
    logq_NV: Tensor,
) -> list[float]:
    """Each token's weighted log-ratio and, discounted, those of its response's later tokens."""
    rewards = [
        w * float(logq_NV[t, y] - logp_NV[t, y])
        for t, (w, y) in enumerate(zip(weights, sampled_ids_N.tolist(), strict=True))
    ]
    credits = [0.0] * len(rewards)
    for begin, end in pairwise(cu_seqlens):
        for t in range(begin, end):
            credits[t] = sum(objective.discount ** (s - t) * rewards[s] for s in range(t, end))
            if objective.baseline == "reverse_kl":
                credits[t] += weights[t] * float((logp_NV[t].exp() * (logp_NV[t] - logq_NV[t])).sum())
    return credits


def mismatch_factor(objective: ObjectiveConfig, engine_logp: float, logp: float) -> float:
    """What objective.mismatch multiplies a token's loss by, and nothing else; NaN: the engine's log p is not known."""
    if objective.mismatch == "none" or math.isnan(engine_logp):
        return 1.0
    ratio = math.exp(logp - engine_logp)
    if objective.mismatch == "truncated":
        return min(ratio, objective.mismatch_high or 2.0)
    return ratio if objective.mismatch_low <= ratio <= (objective.mismatch_high or 5.0) else 0.0
