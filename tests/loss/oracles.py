"""What other systems compute, in their manner and in our words: padded rows, whole logits, autograd.

The formulas were read in the released Prune-OPD code (bff2e00) and in its peers of August 2026 (TRL, Liger, verl,
NeMo-RL, ms-swift, slime, tinker), whose own functions have been run against ours; here they are written anew. Nothing
comes from the package or from tests/reference.py, so a mistake would have to be made three times.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from prune_opd.config import GateConfig, ObjectiveConfig

# ---------------------------------------------------------------------------------------------------- the release


class Released(NamedTuple):
    """Of padded rows [B, T]."""

    loss_sum: Tensor
    overlap_BT: Tensor
    event_BT: Tensor
    weight_BT: Tensor
    reliable_length_B: Tensor
    reward_BT: Tensor  # Σ over the candidates, before the weight


def released(
    student_BTV: Tensor,
    teacher_BTV: Tensor,
    sampled_BT: Tensor,
    mask_BT: Tensor,
    gate: GateConfig,
    objective: ObjectiveConfig,
) -> Released:
    """Prune-OPD's release: fixed token rewards on a support, weighted, then a policy loss at ratio 1."""
    student_BTV = (student_BTV / objective.temperature).log_softmax(-1)
    teacher_BTV = (teacher_BTV / objective.temperature).log_softmax(-1).detach()
    k = objective.k
    student_ids, teacher_ids = (logs.topk(k, dim=-1).indices for logs in (student_BTV, teacher_BTV))
    by_student, by_teacher = (torch.zeros_like(student_BTV, dtype=torch.bool) for _ in range(2))
    by_student.scatter_(-1, student_ids, True)
    by_teacher.scatter_(-1, teacher_ids, True)
    support_BTV = {
        "student": by_student,
        "teacher": by_teacher,
        "union": by_student | by_teacher,
        "intersection": by_student & by_teacher,
    }[objective.support]
    with torch.no_grad():
        scores = {"student_p": student_BTV, "teacher_p": teacher_BTV, "none": torch.zeros_like(student_BTV)}
        chosen = scores[objective.weight].masked_fill(~support_BTV, float("-inf"))
        share_BTV = (chosen - chosen.logsumexp(-1, keepdim=True)).exp().nan_to_num(nan=0.0)
        reward_BTV = torch.where(support_BTV, share_BTV * (teacher_BTV - student_BTV), 0.0)
        event_BT, overlap_BT = _released_events(student_BTV, teacher_BTV, sampled_BT, gate)
        event_BT &= mask_BT
        left_BT = (1.0 - gate.w_drop * event_BT.double().cumsum(-1)).clamp(0.0, 1.0)
        weight_BT = (left_BT + gate.w_base) * mask_BT
        if gate.weight_normalisation == "base":
            weight_BT = weight_BT / (1 + gate.w_base)
        advantage_BTV = weight_BT.unsqueeze(-1) * reward_BTV
    ratio_BTV = (student_BTV - student_BTV.detach()).exp()
    loss_sum = -(advantage_BTV * ratio_BTV * mask_BT.unsqueeze(-1)).sum()
    reliable_length_B = ((left_BT > 1e-8) & mask_BT).sum(-1)
    return Released(loss_sum, overlap_BT, event_BT, weight_BT, reliable_length_B, reward_BTV.sum(-1))


def _released_events(
    student_BTV: Tensor, teacher_BTV: Tensor, sampled_BT: Tensor, gate: GateConfig
) -> tuple[Tensor, Tensor]:
    student_ids, teacher = student_BTV.topk(gate.k, dim=-1).indices, teacher_BTV.topk(gate.k, dim=-1)
    common_BT = torch.stack([(student_ids == ids).any(-1) for ids in teacher.indices.movedim(-1, 0).unsqueeze(-1)])
    overlap_BT = common_BT.sum(0).double() / gate.k
    if gate.metric == "overlap":
        return overlap_BT < gate.threshold - 1e-9, overlap_BT
    before = teacher.values.exp().cumsum(-1) - teacher.values.exp()
    kept = (before < gate.top_p - 1e-12) if gate.top_p < 1 else torch.ones_like(before, dtype=torch.bool)
    return ~((teacher.indices == sampled_BT.unsqueeze(-1)) & kept).any(-1), overlap_BT


# ---------------------------------------------------------------------------------------------------- the peers

# A peer's loss of each token [N]: of both models' logits [N, V] over the temperature, sampled ids [N] and settings.
PeerLoss = Callable[[Tensor, Tensor, Tensor, ObjectiveConfig], Tensor]


@dataclass(frozen=True)
class Peer:
    """A formula that others have. surrogate: its value is not a divergence, only its gradient says something."""

    loss: PeerLoss
    objective: Callable[[int], ObjectiveConfig]  # ours that is the same, of k
    surrogate: bool = False


def kl(left_logs: Tensor, right_logs: Tensor) -> Tensor:
    """KL(left ‖ right) over the last dimension, as torch has it."""
    return F.kl_div(right_logs, left_logs, reduction="none", log_target=True).sum(-1)


def gkd(student_NV: Tensor, teacher_NV: Tensor, sampled_N: Tensor, config: ObjectiveConfig) -> Tensor:
    """Generalised JSD with the mixture as a logsumexp (TRL's GKD and distillation trainers, ms-swift, Liger)."""
    logp, logq = student_NV.log_softmax(-1), teacher_NV.log_softmax(-1)
    beta = torch.tensor(config.beta, dtype=logp.dtype)
    mixture = torch.logsumexp(torch.stack([logp + torch.log1p(-beta), logq + beta.log()]), dim=0)
    return beta * kl(logq, mixture) + (1 - beta) * kl(logp, mixture)


def gkd_reverse(student_NV: Tensor, teacher_NV: Tensor, sampled_N: Tensor, config: ObjectiveConfig) -> Tensor:
    """The same at β = 1, which is the reverse KL there; MiniLLM's single step."""
    return kl(student_NV.log_softmax(-1), teacher_NV.log_softmax(-1))


def best(teacher_NV: Tensor, config: ObjectiveConfig) -> Tensor:
    return teacher_NV.topk(config.k, dim=-1).indices


def cross_entropy(student_NV: Tensor, teacher_NV: Tensor, sampled_N: Tensor, config: ObjectiveConfig) -> Tensor:
    """Cross entropy with the teacher's renormalised top-k less its entropy (tinker's top-k; NeMo-RL's forward with
    zero_outside_topk)."""
    ids = best(teacher_NV, config)
    target = teacher_NV.gather(-1, ids).softmax(-1)
    return -(target * student_NV.log_softmax(-1).gather(-1, ids)).sum(-1) - torch.special.entr(target).sum(-1)


def local_reverse(student_NV: Tensor, teacher_NV: Tensor, sampled_N: Tensor, config: ObjectiveConfig) -> Tensor:
    """A softmax over the logits at the teacher's top-k alone, of both (NeMo-RL's reverse, ms-swift's top-k, TRL's
    asynchronous trainer without a tail)."""
    ids = best(teacher_NV, config)
    return kl(student_NV.gather(-1, ids).log_softmax(-1), teacher_NV.gather(-1, ids).log_softmax(-1))


def reverse_with_tail(student_NV: Tensor, teacher_NV: Tensor, sampled_N: Tensor, config: ObjectiveConfig) -> Tensor:
    """The top-k and one more outcome with 1 − Σ (TRL's `add_tail`)."""
    ids = best(teacher_NV, config)

    def with_tail(logits_NV: Tensor) -> Tensor:
        logs = logits_NV.log_softmax(-1).gather(-1, ids)
        return torch.cat([logs, torch.log1p(-logs.exp().sum(-1, keepdim=True))], dim=-1)

    return kl(with_tail(student_NV), with_tail(teacher_NV))


def k1_advantage(student_NV: Tensor, teacher_NV: Tensor, sampled_N: Tensor, config: ObjectiveConfig) -> Tensor:
    """log q(y) − log p(y) as the advantage of a policy gradient at ratio 1 (slime, verl's k1, NeMo-RL's estimator)."""
    y = sampled_N.unsqueeze(-1)
    logp, logq = (logits.log_softmax(-1).gather(-1, y).squeeze(-1) for logits in (student_NV, teacher_NV))
    return -(logq - logp).detach() * (logp - logp.detach()).exp()


def gkd_forward(student_NV: Tensor, teacher_NV: Tensor, sampled_N: Tensor, config: ObjectiveConfig) -> Tensor:
    """GKD at β = 0 (TRL, Liger, ms-swift; NeMo-RL's distributed cross entropy less the teacher's entropy)."""
    return kl(teacher_NV.log_softmax(-1), student_NV.log_softmax(-1))


def raw_forward(student_NV: Tensor, teacher_NV: Tensor, sampled_N: Tensor, config: ObjectiveConfig) -> Tensor:
    """verl's forward_kl_topk: raw logs of both at the teacher's top-k, each held above, and a token's loss held."""
    ids = best(teacher_NV, config)
    logp, logq = (logits.log_softmax(-1).gather(-1, ids) for logits in (student_NV, teacher_NV))
    if config.logp_min is not None:
        logp, logq = logp.clamp_min(config.logp_min), logq.clamp_min(config.logp_min)
    value = kl(logq, logp)
    return value if config.loss_max is None else value.clamp(-config.loss_max, config.loss_max)


def local_mixed(student_NV: Tensor, teacher_NV: Tensor, sampled_N: Tensor, config: ObjectiveConfig) -> Tensor:
    """NeMo-RL's forward, reverse and mixed: both renormalised on the teacher's top-k."""
    ids = best(teacher_NV, config)
    logp, logq = (logits.gather(-1, ids).log_softmax(-1) for logits in (student_NV, teacher_NV))
    share = 1.0 if config.name == "topk_forward_kl" else config.forward_share
    return share * kl(logq, logp) + (1 - share) * kl(logp, logq)


def zero_outside(student_NV: Tensor, teacher_NV: Tensor, sampled_N: Tensor, config: ObjectiveConfig) -> Tensor:
    """NeMo-RL's reverse with zero_outside_topk: −H of the student's rest, less its mass times the log of nearly 0."""
    ids = best(teacher_NV, config)
    logs = student_NV.log_softmax(-1)
    logp, logq = logs.gather(-1, ids), teacher_NV.gather(-1, ids).log_softmax(-1)
    rest = (logs.exp() * logs).sum(-1) - (logp.exp() * logp).sum(-1)
    return kl(logp, logq) + rest - config.outside_logp * (1 - logp.exp().sum(-1))


def local_jsd(student_NV: Tensor, teacher_NV: Tensor, sampled_N: Tensor, config: ObjectiveConfig) -> Tensor:
    """GKD on the logits at the teacher's top-k alone (ms-swift; TRL's asynchronous trainer without a tail)."""
    ids = best(teacher_NV, config)
    return gkd(student_NV.gather(-1, ids), teacher_NV.gather(-1, ids), sampled_N, config)


def estimator(student_NV: Tensor, teacher_NV: Tensor, sampled_N: Tensor, config: ObjectiveConfig) -> Tensor:
    """verl's k2 and k3, differentiated."""
    y = sampled_N.unsqueeze(-1)
    logp, logq = (logits.log_softmax(-1).gather(-1, y).squeeze(-1) for logits in (student_NV, teacher_NV))
    if config.logp_min is not None:
        logp, logq = logp.clamp_min(config.logp_min), logq.clamp_min(config.logp_min)
    log_ratio = logq - logp
    value = 0.5 * log_ratio.square() if config.name == "sampled_k2" else log_ratio.exp() - log_ratio - 1
    return value if config.loss_max is None else value.clamp(-config.loss_max, config.loss_max)


PEERS = {
    "GKD, beta .1": Peer(gkd, lambda k: ObjectiveConfig("full_vocab_jsd", k=k, beta=0.1)),
    "GKD, beta .5": Peer(gkd, lambda k: ObjectiveConfig("full_vocab_jsd", k=k)),
    "GKD, beta .9": Peer(gkd, lambda k: ObjectiveConfig("full_vocab_jsd", k=k, beta=0.9)),
    "GKD, beta 0": Peer(gkd_forward, lambda k: ObjectiveConfig("full_vocab_forward_kl", k=k)),
    "GKD, beta 1": Peer(gkd_reverse, lambda k: ObjectiveConfig("full_vocab_reverse_kl", k=k)),
    "top-k cross entropy": Peer(cross_entropy, lambda k: ObjectiveConfig("topk_forward_kl", k=k)),
    "top-k reverse, both renormalised": Peer(local_reverse, lambda k: ObjectiveConfig("local_support_matching", k=k)),
    "top-k reverse with a tail": Peer(
        reverse_with_tail, lambda k: ObjectiveConfig(k=k, support="teacher", tail="bucket")
    ),
    "raw top-k forward": Peer(raw_forward, lambda k: ObjectiveConfig("topk_forward_kl", k=k, renormalise="none")),
    "raw top-k forward, clamped": Peer(
        raw_forward,
        lambda k: ObjectiveConfig("topk_forward_kl", k=k, renormalise="none", logp_min=-4.0, loss_max=0.5),
    ),
    "top-k forward, both renormalised": Peer(
        local_mixed, lambda k: ObjectiveConfig("topk_forward_kl", k=k, renormalise="both")
    ),
    "top-k mixed": Peer(local_mixed, lambda k: ObjectiveConfig("topk_mixed_kl", k=k, forward_share=0.3)),
    "top-k reverse, zero outside": Peer(zero_outside, lambda k: ObjectiveConfig("priced_reverse_kl", k=k)),
    "top-k GKD": Peer(local_jsd, lambda k: ObjectiveConfig("topk_jsd", k=k, beta=0.3)),
    "k2": Peer(estimator, lambda k: ObjectiveConfig("sampled_k2", k=k)),
    "k3": Peer(estimator, lambda k: ObjectiveConfig("sampled_k3", k=k)),
    "k3, clamped": Peer(estimator, lambda k: ObjectiveConfig("sampled_k3", k=k, logp_min=-6.0, loss_max=1.0)),
    "k1 as an advantage": Peer(k1_advantage, lambda k: ObjectiveConfig("sampled_token", k=k), surrogate=True),
}
