"""Per-token objectives: the mathematics of one token's loss, with no model, vocabulary shard or group in it.

    topk_reverse_kl     −Σ_j r_j log p_j,  r_j = −W w_j sg(log p_j − log q_j − b) on a support of top-k ids
    sampled_token       −r log p(y),       r = −W sg(log p(y) − log q(y))         on the sampled token alone

p student, q teacher, both over the full vocabulary; W the training weight, a constant; sg stop-gradient; b the baseline
that `tail` chooses, 0 as published (`topk_reverse_kl`). These two are policy gradients: a reward a candidate, and a
ratio to the policy that sampled the batch when it has moved since (`clipped_policy_loss`). With `discount` a sampled
token's reward has those of later tokens in it (method/credit.py). All others are divergences that are differentiated
(method/divergences.py has them and their formulas), times W.

An objective sees log-probabilities at K candidates a token and returns the loss and its derivative in the student's
log p_j. The fused loss (loss/distill.py) does the rest and knows no objective by name: `candidates` says where to look,
`token_loss` what that costs. An objective on the whole vocabulary sees the columns of one rank as its candidates
and so may use nothing but sums over them. A new objective is one more function and one more entry in a table.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from prune_opd.config import ObjectiveConfig
from prune_opd.method.divergences import DIVERGENCES
from prune_opd.method.sets import among

# ---------------------------------------------------------------------------------------------------- candidates


class Candidates(NamedTuple):
    """Where an objective looks: ids_NK, and which of them count. An id counts once; None: all do."""

    ids_NK: Tensor
    valid_NK: Tensor | None = None


def _union(student_NK: Tensor, teacher_NK: Tensor) -> Candidates:
    """2k wide: the student's, then the teacher's where the student has not got them already."""
    new_NK = ~among(teacher_NK, student_NK)
    return Candidates(torch.cat([student_NK, teacher_NK], dim=1), torch.cat([torch.ones_like(new_NK), new_NK], dim=1))


def _intersection(student_NK: Tensor, teacher_NK: Tensor) -> Candidates:
    """k wide: the student's where the teacher has them too. There may be none: such a token has no loss."""
    return Candidates(student_NK, among(student_NK, teacher_NK))


_SUPPORTS: dict[str, Callable[[Tensor, Tensor], Candidates]] = {
    "student": lambda student_NK, teacher_NK: Candidates(student_NK),
    "teacher": lambda student_NK, teacher_NK: Candidates(teacher_NK),
    "union": _union,
    "intersection": _intersection,
}
_ON_VOCABULARY = ("full_vocab_reverse_kl", "full_vocab_forward_kl", "full_vocab_mixed_kl", "full_vocab_jsd")
_ON_SAMPLED = ("sampled_token", "sampled_k2", "sampled_k3")
_OWN_SUPPORT = dict.fromkeys(
    ("local_support_matching", "topk_forward_kl", "topk_mixed_kl", "topk_jsd", "priced_reverse_kl"), "teacher"
)


def on_vocabulary(config: ObjectiveConfig) -> bool:
    """Whether the objective is a sum over the whole vocabulary, and not over a few candidates."""
    return config.name in _ON_VOCABULARY or is_priced(config)


def is_priced(config: ObjectiveConfig) -> bool:
    """Whether it is on the whole vocabulary with a teacher that is known at the candidates only."""
    return config.name == "priced_reverse_kl"


def kl_share(config: ObjectiveConfig) -> float | None:
    """The forward KL's share in a mixture of both KL on the whole vocabulary; None for another objective."""
    shares = {"full_vocab_reverse_kl": 0.0, "full_vocab_forward_kl": 1.0, "full_vocab_mixed_kl": config.forward_share}
    return shares.get(config.name)


def top_k(config: ObjectiveConfig) -> int:
    """How many of each model's best ids `candidates` needs."""
    return 0 if config.name in (*_ON_VOCABULARY, *_ON_SAMPLED) else config.k


def candidates(
    config: ObjectiveConfig, sampled_ids_N: Tensor, student_ids_NK: Tensor, teacher_ids_NK: Tensor
) -> Candidates:
    """The candidates [N, K] of each token, out of what was sampled and both models' top-k ids.

    student_ids_NK, teacher_ids_NK: most probable first, at least `top_k` wide. K = 0 for one on the whole vocabulary,
    but for a priced one.
    """
    if config.name in _ON_VOCABULARY:
        return Candidates(sampled_ids_N.new_empty(len(sampled_ids_N), 0))
    if config.name in _ON_SAMPLED:
        return Candidates(sampled_ids_N.unsqueeze(1))
    support = _OWN_SUPPORT.get(config.name, config.support)
    return _SUPPORTS[support](student_ids_NK[:, : config.k], teacher_ids_NK[:, : config.k])


# ---------------------------------------------------------------------------------------------------- policy gradients

Pair = tuple[Tensor, Tensor]  # of the student, of the teacher


class Terms(NamedTuple):
    """slope_NK: −r_j / W, the derivative in log p_j. divergence_N: the number to watch, unweighted [nats]."""

    slope_NK: Tensor
    divergence_N: Tensor


def has_rest(config: ObjectiveConfig) -> bool:
    """Whether the objective needs the mass of all ids that are not candidates."""
    return config.name == "topk_reverse_kl" and config.tail == "bucket"


def topk_reverse_kl(
    student_logp_NK: Tensor,
    teacher_logp_NK: Tensor,
    config: ObjectiveConfig,
    valid_NK: Tensor | None = None,
    log_rest: Pair | None = None,
) -> Terms:
    """The reverse KL on a support K (Prune-OPD §2, method.md §1 and §7): slopes w_j (δ_j − b), δ_j = log p_j − log q_j.

    w_j = p_j / Σ_i p_i over the support (student_p), q_j / Σ_i q_i (teacher_p), or 1 / |support| (none: uniform, as
    the released code has it).

        tail      b                               what is descended
        none      0                               the published form. Its slopes sum to the divergence, so that while
                                                  it is positive every id outside the support is raised, whatever the
                                                  teacher says of it: mass leaks out of the support
        bucket    δ_rest = log p_rest / q_rest    with w_j = p_j: exactly the KL of p and q with all other ids as one
                                                  outcome, Σ_K p δ + p_rest δ_rest: 0 only where both agree on K
        centred   Σ_j w_j δ_j / Σ_j w_j           slopes sum to 0; with student_p exactly KL(p̄ ‖ q̄), both renormalised
                                                  on K: what lies outside is neither raised nor lowered

    log_rest: log p_rest, log q_rest [N], for `bucket`.
    """
    gap_NK = student_logp_NK - teacher_logp_NK
    if log_rest is not None:
        share_NK = _only(student_logp_NK.exp(), valid_NK)
        baseline_N = log_rest[0] - log_rest[1]
        divergence_N = _only(share_NK * gap_NK, valid_NK).sum(dim=-1) + log_rest[0].exp() * baseline_N
        return Terms(_only(share_NK * (gap_NK - baseline_N.unsqueeze(-1)), valid_NK), divergence_N)
    weight_NK = _weights(student_logp_NK, teacher_logp_NK, config, valid_NK)
    slope_NK = _only(weight_NK * gap_NK, valid_NK)
    divergence_N = slope_NK.sum(dim=-1)
    if config.tail == "none":
        return Terms(slope_NK, divergence_N)
    total_N = weight_NK.sum(dim=-1)
    mean_N = torch.where(total_N > 0, divergence_N / total_N, 0)
    outside_N = _log_mass(student_logp_NK, valid_NK) - _log_mass(teacher_logp_NK, valid_NK)
    divergence_N = torch.where(total_N > 0, divergence_N - total_N * outside_N, 0)
    return Terms(_only(weight_NK * (gap_NK - mean_N.unsqueeze(-1)), valid_NK), divergence_N)


def _weights(
    student_logp_NK: Tensor, teacher_logp_NK: Tensor, config: ObjectiveConfig, valid_NK: Tensor | None
) -> Tensor:
    """w_j of the support's ids, 0 of others."""
    if config.weight == "none":
        return _uniform(student_logp_NK, valid_NK)
    logp_NK = student_logp_NK if config.weight == "student_p" else teacher_logp_NK
    if valid_NK is not None:
        logp_NK = logp_NK.masked_fill(~valid_NK, -math.inf)
    # A softmax over the support is p renormalised on it. Of an empty one it is not a number, and `_only` drops it.
    return _only(logp_NK.softmax(dim=-1), valid_NK)


def _uniform(logp_NK: Tensor, valid_NK: Tensor | None) -> Tensor:
    """1 / |support| of the support's ids, 0 of others; all 0 of an empty one."""
    if valid_NK is None:
        return torch.full_like(logp_NK, 1 / max(logp_NK.shape[1], 1))
    return valid_NK / valid_NK.sum(dim=-1, keepdim=True).clamp(min=1).to(logp_NK.dtype)


def _log_mass(logp_NK: Tensor, valid_NK: Tensor | None) -> Tensor:
    return (logp_NK if valid_NK is None else logp_NK.masked_fill(~valid_NK, -math.inf)).logsumexp(dim=-1)


def sampled_token(
    student_logp_NK: Tensor,
    teacher_logp_NK: Tensor,
    config: ObjectiveConfig,
    valid_NK: Tensor | None = None,
    log_rest: Pair | None = None,
) -> Terms:
    """log p(y) − log q(y): a one-sample estimate of the reverse KL, of either sign (POPD/TOPD).

    With `baseline` = reverse_kl its mean KL(p ‖ q) is taken from it, as a constant: vOPD ("KL for a KL: On-Policy
    Distillation with Control Variate Baseline", arXiv 2605.07865, the abstract was read), whose value function is just
    that in closed form. E_y[∇ log p(y)] = 0, so the mean gradient stays and its variance falls. With a discount only
    the token's own reward has a baseline (ours): later ones depend on y. The paper's top-k form of it is not built.
    """
    gap_NK = student_logp_NK - teacher_logp_NK
    return Terms(gap_NK, gap_NK.sum(dim=-1))


def _only(terms_NK: Tensor, valid_NK: Tensor | None) -> Tensor:
    return terms_NK if valid_NK is None else terms_NK.masked_fill(~valid_NK, 0)


_PolicyGradient = Callable[[Tensor, Tensor, ObjectiveConfig, Tensor | None, Pair | None], Terms]
_POLICY_GRADIENTS: dict[str, _PolicyGradient] = {"topk_reverse_kl": topk_reverse_kl, "sampled_token": sampled_token}


def has_rewards(config: ObjectiveConfig) -> bool:
    """Whether the objective is a policy gradient, to which the ratio of new to old policy applies."""
    return config.name in _POLICY_GRADIENTS


def has_baseline(config: ObjectiveConfig) -> bool:
    """Whether a reward is taken less its mean, for which the reverse KL over the vocabulary is needed."""
    return config.baseline != "none"


def has_credit(config: ObjectiveConfig) -> bool:
    """Whether later tokens have a part in a token's reward."""
    return config.discount > 0


# ---------------------------------------------------------------------------------------------------- one token's loss


class TokenLoss(NamedTuple):
    """loss_N: ℓ_t. grad_logp_NK: ∂ℓ_t/∂log p_j, the coefficients of the gradient.

    divergence_N: how far the student is from the teacher by this objective, unweighted [nats]. A policy gradient's ℓ_t
    has the gradient that is wanted but its value says little (it may be negative); this is the number to watch.
    """

    loss_N: Tensor
    grad_logp_NK: Tensor
    divergence_N: Tensor
    has_rewards: bool

    @property
    def reward_NK(self) -> Tensor | None:
        """r_tj, weighted; None for an objective without."""
        return -self.grad_logp_NK if self.has_rewards else None


def token_loss(
    config: ObjectiveConfig,
    student_logp_NK: Tensor,
    teacher_logp_NK: Tensor,
    weight_N: Tensor,
    valid_NK: Tensor | None = None,
    log_rest: Pair | None = None,
    credit_N: Tensor | None = None,
    baseline_N: Tensor | None = None,
) -> TokenLoss:
    """The configured objective at its candidates' log-probabilities over the full vocabulary. weight_N: W_t.

    log_rest: both models' log mass [N] on all other ids, where `has_rest`. credit_N: the reward of a sampled token,
    where `has_credit`, with the weights in it. baseline_N: KL(p ‖ q), where `has_baseline`.
    """
    weight_N1 = weight_N.unsqueeze(-1)
    if has_rewards(config):
        terms = _POLICY_GRADIENTS[config.name](student_logp_NK, teacher_logp_NK, config, valid_NK, log_rest)
        # ∂ℓ/∂log p_j = −r_j: no "+ 1" term, nothing through the renormaliser.
        gap_NK = terms.slope_NK if baseline_N is None else terms.slope_NK - baseline_N.unsqueeze(-1)
        slope_NK = weight_N1 * gap_NK if credit_N is None else -credit_N.unsqueeze(-1)
        return TokenLoss((slope_NK * student_logp_NK).sum(dim=-1), slope_NK, terms.divergence_N, True)
    value_N, slope_NK = DIVERGENCES[config.name](student_logp_NK, teacher_logp_NK, config)
    return TokenLoss(weight_N * value_N, weight_N1 * slope_NK, value_N, False)


class ClippedLoss(NamedTuple):
    """As TokenLoss; ratio_NK: p_j / p_j^old. clipped_NK: where the clip has taken the gradient away."""

    loss_N: Tensor
    grad_logp_NK: Tensor
    ratio_NK: Tensor
    clipped_NK: Tensor


def clipped_policy_loss(
    config: ObjectiveConfig, student_logp_NK: Tensor, old_logp_NK: Tensor, reward_NK: Tensor
) -> ClippedLoss:
    """The PPO surrogate of a policy gradient whose candidates and rewards are those of the old policy (method.md §1).

        ρ_j = p_j / p_j^old,   ℓ = −Σ_j min(ρ_j r_j, clip(ρ_j, 1 ± clip) r_j),   but never more than −dual_clip · r_j
                                                                                 for a negative r_j (dual clip)

    At ρ = 1 its gradient is that of the unclipped loss, −Σ_j r_j ∇log p_j; its value is −Σ_j r_j.
    """
    # ± 20 nats change nothing that is not clipped, and keep the ratio a number.
    ratio_NK = (student_logp_NK - old_logp_NK).clamp(-20, 20).exp()
    plain_NK = ratio_NK * reward_NK
    surrogate_NK = torch.minimum(plain_NK, ratio_NK.clamp(1 - config.clip, 1 + config.clip) * reward_NK)
    surrogate_NK = torch.where(reward_NK < 0, torch.maximum(surrogate_NK, config.dual_clip * reward_NK), surrogate_NK)
    clipped_NK = surrogate_NK != plain_NK
    return ClippedLoss(-surrogate_NK.sum(dim=-1), -plain_NK.masked_fill(clipped_NK, 0), ratio_NK, clipped_NK)
