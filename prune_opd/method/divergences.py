"""Divergences that are differentiated: value and derivative in the student's log p_j, at the candidates of a token.

On the whole vocabulary (candidates: every id of a rank; so nothing but sums over them):

    full_vocab_reverse_kl    Σ_v p_v (log p_v − log q_v)
    full_vocab_forward_kl    Σ_v q_v (log q_v − log p_v)
    full_vocab_mixed_kl      φ forward + (1 − φ) reverse,  φ = forward_share
    full_vocab_jsd           β Σ_v q_v log(q_v / m_v) + (1 − β) Σ_v p_v log(p_v / m_v),  m = β q + (1 − β) p
    priced_reverse_kl        Σ_v p_v (log p_v − log t_v), t = q̄ on the teacher's top-k; log t = `outside_logp` elsewhere

On the teacher's top-k, p̄ and q̄ renormalised there, the gradient going through p̄ and its renormaliser:

    local_support_matching   reverse KL of p̄ and q̄
    topk_mixed_kl            the mixture of both KL
    topk_jsd                 their generalised JSD
    topk_forward_kl          Σ_j q̄_j (log q̄_j − log p_j); `renormalise = none`: q for q̄; `both`: p̄ for p

On the sampled token y, with δ = log p(y) − log q(y) (estimators of the reverse KL, differentiated as they are):

    sampled_k2               δ² / 2
    sampled_k3               e^−δ + δ − 1

`logp_min` and `loss_max` are verl's clamps; what a clamp holds has no gradient. A multiple of p_v in the slopes of an
objective on the whole vocabulary changes no gradient, for Σ_v p_v is 1: it is chosen so that equal models have slopes
of exactly 0.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from prune_opd.config import ObjectiveConfig


class Divergence(NamedTuple):
    """value_N: the sum over the candidates at hand. slope_NK: its derivative in log p_j."""

    value_N: Tensor
    slope_NK: Tensor


_Divergence = Callable[[Tensor, Tensor, ObjectiveConfig], Divergence]


# ---------------------------------------------------------------------------------------------------- whole vocabulary


def full_vocab_reverse_kl(student_logp_NV: Tensor, teacher_logp_NV: Tensor, config: ObjectiveConfig) -> Divergence:
    """Σ_v p_v (log p_v − log q_v)."""
    term_NV = student_logp_NV.exp() * (student_logp_NV - teacher_logp_NV)
    return Divergence(term_NV.sum(dim=-1), term_NV)


def full_vocab_forward_kl(student_logp_NV: Tensor, teacher_logp_NV: Tensor, config: ObjectiveConfig) -> Divergence:
    """Σ_v q_v (log q_v − log p_v)."""
    teacher_NV = teacher_logp_NV.exp()
    value_N = (teacher_NV * (teacher_logp_NV - student_logp_NV)).sum(dim=-1)
    return Divergence(value_N, student_logp_NV.exp() - teacher_NV)


def full_vocab_mixed_kl(student_logp_NV: Tensor, teacher_logp_NV: Tensor, config: ObjectiveConfig) -> Divergence:
    """φ times the forward and 1 − φ times the reverse KL (NeMo-RL's `mixed`)."""
    forward = full_vocab_forward_kl(student_logp_NV, teacher_logp_NV, config)
    reverse = full_vocab_reverse_kl(student_logp_NV, teacher_logp_NV, config)
    share = config.forward_share
    return Divergence(*(share * one + (1 - share) * other for one, other in zip(forward, reverse, strict=True)))


def full_vocab_jsd(student_logp_NV: Tensor, teacher_logp_NV: Tensor, config: ObjectiveConfig) -> Divergence:
    """Generalised Jensen-Shannon divergence (GKD, arXiv 2306.13649): β KL(q ‖ m) + (1 − β) KL(p ‖ m).

    Its derivative in log p_v is (1 − β) p_v log(p_v / m_v). Toward β = 0 and 1, where it vanishes, JSD / β and
    JSD / (1 − β) become the forward and the reverse KL.
    """
    beta, gap_NV = config.beta, teacher_logp_NV - student_logp_NV
    # log(m / p), from the larger of both so that nothing overflows; exactly 0 where p = q.
    below_NV = torch.log1p(beta * torch.expm1(gap_NV.clamp(max=0)))
    above_NV = gap_NV + torch.log1p((1 - beta) * torch.expm1(-gap_NV.clamp(min=0)))
    log_ratio_NV = torch.where(gap_NV <= 0, below_NV, above_NV)
    slope_NV = -(1 - beta) * student_logp_NV.exp() * log_ratio_NV
    teacher_NV = beta * teacher_logp_NV.exp() * (gap_NV - log_ratio_NV)
    return Divergence((teacher_NV + slope_NV).sum(dim=-1), slope_NV)


# ---------------------------------------------------------------------------------------------------- top-k


def renormalised(on_whole: _Divergence) -> _Divergence:
    """A divergence of both models renormalised on the candidates, from the one on the whole vocabulary."""

    def divergence(student_logp_NK: Tensor, teacher_logp_NK: Tensor, config: ObjectiveConfig) -> Divergence:
        local_logp_NK = student_logp_NK.log_softmax(dim=-1)
        value_N, slope_NK = on_whole(local_logp_NK, teacher_logp_NK.log_softmax(dim=-1), config)
        return Divergence(value_N, slope_NK - local_logp_NK.exp() * slope_NK.sum(dim=-1, keepdim=True))

    return divergence


local_support_matching = renormalised(full_vocab_reverse_kl)


def topk_forward_kl(student_logp_NK: Tensor, teacher_logp_NK: Tensor, config: ObjectiveConfig) -> Divergence:
    """Σ_j q_j (log q_j − log p_j); `renormalise` says which of both are renormalised: q, none (verl), or both."""
    student_logp_NK, kept_NK = _at_least(student_logp_NK, config.logp_min)
    teacher_logp_NK, _ = _at_least(teacher_logp_NK, config.logp_min)
    if config.renormalise == "both":
        value_N, slope_NK = renormalised(full_vocab_forward_kl)(student_logp_NK, teacher_logp_NK, config)
    else:
        if config.renormalise == "q":
            teacher_logp_NK = teacher_logp_NK.log_softmax(dim=-1)
        teacher_NK = teacher_logp_NK.exp()
        value_N, slope_NK = (teacher_NK * (teacher_logp_NK - student_logp_NK)).sum(dim=-1), -teacher_NK
    return _at_most(Divergence(value_N, slope_NK * kept_NK), config.loss_max)


# ---------------------------------------------------------------------------------------------------- sampled token


def sampled_k2(student_logp_N1: Tensor, teacher_logp_N1: Tensor, config: ObjectiveConfig) -> Divergence:
    """δ² / 2: its gradient is that of the policy gradient `sampled_token`."""
    gap_N1, kept_N1 = _gap(student_logp_N1, teacher_logp_N1, config)
    return _at_most(Divergence((gap_N1**2 / 2).sum(dim=-1), gap_N1 * kept_N1), config.loss_max)


def sampled_k3(student_logp_N1: Tensor, teacher_logp_N1: Tensor, config: ObjectiveConfig) -> Divergence:
    """e^−δ + δ − 1, never below 0 (verl's default). Its gradient is in mean over the student's y the forward KL's."""
    gap_N1, kept_N1 = _gap(student_logp_N1, teacher_logp_N1, config)
    slope_N1 = -torch.expm1(-gap_N1)
    return _at_most(Divergence((gap_N1 - slope_N1).sum(dim=-1), slope_N1 * kept_N1), config.loss_max)


def _gap(student_logp_N1: Tensor, teacher_logp_N1: Tensor, config: ObjectiveConfig) -> tuple[Tensor, Tensor]:
    """δ of the clamped logs, and where the student's has a gradient."""
    student_logp_N1, kept_N1 = _at_least(student_logp_N1, config.logp_min)
    return student_logp_N1 - _at_least(teacher_logp_N1, config.logp_min)[0], kept_N1


def _at_least(logp_NK: Tensor, least: float | None) -> tuple[Tensor, Tensor]:
    """Log-probabilities, no less than `least`, and which of them have kept their gradient."""
    if least is None:
        return logp_NK, torch.ones_like(logp_NK, dtype=torch.bool)
    return logp_NK.clamp(min=least), logp_NK >= least


def _at_most(divergence: Divergence, most: float | None) -> Divergence:
    """A token's value within ± `most`; no gradient where it is held."""
    if most is None:
        return divergence
    value_N, slope_NK = divergence
    return Divergence(value_N.clamp(-most, most), slope_NK * (value_N.abs() <= most).unsqueeze(-1))


DIVERGENCES: dict[str, _Divergence] = {
    "sampled_k2": sampled_k2,
    "sampled_k3": sampled_k3,
    "local_support_matching": local_support_matching,
    "topk_forward_kl": topk_forward_kl,
    "topk_mixed_kl": renormalised(full_vocab_mixed_kl),
    "topk_jsd": renormalised(full_vocab_jsd),
    "priced_reverse_kl": full_vocab_reverse_kl,  # of the teacher that loss/chunk.py has priced
    "full_vocab_reverse_kl": full_vocab_reverse_kl,
    "full_vocab_forward_kl": full_vocab_forward_kl,
    "full_vocab_mixed_kl": full_vocab_mixed_kl,
    "full_vocab_jsd": full_vocab_jsd,
}
