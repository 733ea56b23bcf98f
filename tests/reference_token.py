"""One token's loss and statistics in their plainest form, for tests/reference.py: float64, ordinary autograd."""

from __future__ import annotations

import heapq

import torch
from torch import Tensor

from prune_opd.config import ObjectiveConfig


def top_ids(logits_V: Tensor, k: int) -> list[int]:
    """The k best ids of one token, ties to the lower id."""
    values = logits_V.tolist()
    return heapq.nsmallest(k, range(len(values)), key=lambda v: (-values[v], v))


def nucleus(logp_V: Tensor, ids: list[int], p: float) -> set[int]:
    """ids in descending order up to and including the first whose cumulative probability reaches p."""
    accepted, total = set(), 0.0
    for v in ids:
        accepted.add(v)
        total += float(logp_V[v].exp())
        if total >= p:
            break
    return accepted


def forward_kl(logp_V: Tensor, logq_V: Tensor, ids: list[int]) -> Tensor:
    q = logq_V[ids].exp()
    q = q / q.sum()
    return (q * (q.log() - logp_V[ids])).sum()


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
        return weight * gap.detach() * logp_V[sampled], gap
    if objective.name == "local_support_matching":
        p_K, q_K = p_V[teachers] / p_V[teachers].sum(), q_V[teachers] / q_V[teachers].sum()
        value = (p_K * (p_K / q_K).log()).sum()
    elif objective.name == "topk_forward_kl":
        value = forward_kl(logp_V, logq_V, teachers)
    elif objective.name == "full_vocab_reverse_kl":
        value = (p_V * (logp_V - logq_V)).sum()
    else:
        m_V = objective.beta * q_V + (1 - objective.beta) * p_V
        value = objective.beta * (q_V * (q_V / m_V).log()).sum()
        value = value + (1 - objective.beta) * (p_V * (p_V / m_V).log()).sum()
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
