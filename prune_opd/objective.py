"""Per-token objectives on a support: the mathematics of one token's loss, with no model, vocabulary or group in it.

An objective sees full-vocabulary log-probabilities of both models at K candidates a token, and the gate's weight. It
returns the loss and its derivative with respect to the student's log p_j, taking as constant whatever the method stops
the gradient at. The fused loss (fused_loss.py) does the rest and knows no objective by name: it asks `support_ids`
where to look and `token_loss` what that costs. A new objective is one more function and one more entry in a table.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from prune_opd.config import ObjectiveConfig


class TokenLoss(NamedTuple):
    """reward_NK: r_tj, weighted. loss_N: ℓ_t. grad_logp_NK: ∂ℓ_t/∂log p_j, the coefficients of the gradient.

    divergence_N: how far the student is from the teacher on the support, unweighted [nats]. ℓ_t has the gradient that
    is wanted but its value says little (it may be negative); this is the number to watch.
    """

    reward_NK: Tensor
    loss_N: Tensor
    grad_logp_NK: Tensor
    divergence_N: Tensor


def topk_reverse_kl(
    student_logp_NK: Tensor, teacher_logp_NK: Tensor, weight_N: Tensor, config: ObjectiveConfig
) -> TokenLoss:
    """Reverse KL on a support, as a policy gradient (Prune-OPD §2, eqs. of method.md §1 and §2).

        w_tj = sg(p_j / Σ_{i∈support} p_i)
        r_tj = −W_t · w_tj · (sg log p_j − log q_j)
        ℓ_t  = −Σ_j r_tj log p_j          so that ∂ℓ_t/∂log p_j = −r_tj: no "+1", nothing through the renormaliser

    student_logp_NK, teacher_logp_NK: log p_j and log q_j over the full vocabulary [N, K]. weight_N: W_t [N].
    """
    share_NK = student_logp_NK.softmax(dim=-1)  # w: softmax over the support is p renormalised on it
    divergence_NK = share_NK * (student_logp_NK - teacher_logp_NK)
    reward_NK = -weight_N.unsqueeze(-1) * divergence_NK
    loss_N = -(reward_NK * student_logp_NK).sum(dim=-1)
    return TokenLoss(reward_NK, loss_N, -reward_NK, divergence_NK.sum(dim=-1))


_Objective = Callable[[Tensor, Tensor, Tensor, ObjectiveConfig], TokenLoss]
_Support = Callable[[Tensor, Tensor, Tensor, int], Tensor]

_OBJECTIVES: dict[str, _Objective] = {"topk_reverse_kl": topk_reverse_kl}
_SUPPORTS: dict[str, _Support] = {"student": lambda sampled_N, student_NK, teacher_NK, k: student_NK[:, :k]}


def support_ids(
    config: ObjectiveConfig, sampled_ids_N: Tensor, student_ids_NK: Tensor, teacher_ids_NK: Tensor
) -> Tensor:
    """Token ids the objective is taken on [N, K], out of what was sampled and both models' top-k ids.

    student_ids_NK, teacher_ids_NK: most probable first, at least config.k wide.
    """
    return _SUPPORTS[config.support](sampled_ids_N, student_ids_NK, teacher_ids_NK, config.k)


def token_loss(
    config: ObjectiveConfig, student_logp_NK: Tensor, teacher_logp_NK: Tensor, weight_N: Tensor
) -> TokenLoss:
    """The configured objective at the log-probabilities of its support."""
    return _OBJECTIVES[config.name](student_logp_NK, teacher_logp_NK, weight_N, config)
