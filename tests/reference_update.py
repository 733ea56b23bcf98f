"""More of the plain form: a student that has moved since its batch was sampled, a task's reward beside the teacher."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from prune_opd.config import GateConfig, ObjectiveConfig, WeightingConfig
from tests.reference_token import (
    as_one_end,
    credits_of,
    forward_kl,
    support_of,
    token_loss,
    top_ids,
    trust,
    with_one_end,
)

if TYPE_CHECKING:
    from tests.reference import Case


def reference_reward(old: Case, moved: Case, objective: ObjectiveConfig) -> Tensor:
    """What a task's reward adds to the loss: PPO's surrogate with the advantage of each token's response, corrected.

    moved: `old` itself in the first update, whose ratio is 1.
    """
    size = moved.vocab_size
    moved_NV, old_NV = (case.student_hidden.double() @ case.student_weight[:size].double().T for case in (moved, old))
    if objective.ends == "class":
        moved_NV, old_NV = (with_one_end(whole_NV, moved.terminal_ids) for whole_NV in (moved_NV, old_NV))
    ids = as_one_end(moved.sampled, moved.terminal_ids) if objective.ends == "class" else moved.sampled
    assert old.advantage is not None
    loss_sum = moved_NV.sum() * 0
    for t, y in enumerate(ids.tolist()):
        old_logp = old_NV[t].detach().log_softmax(-1)[y]
        advantage = float(old.advantage[t])
        if old.stale_logp is not None and not math.isnan(old.stale_logp[t]):
            stale = float((old_logp - old.stale_logp[t]).exp())
            advantage *= min(max(stale, 1 - objective.clip), 1 + objective.clip)
        ratio = (moved_NV[t].log_softmax(-1)[y] - old_logp).exp()
        surrogate = torch.min(ratio * advantage, ratio.clamp(1 - objective.clip, 1 + objective.clip) * advantage)
        if advantage < 0:
            surrogate = torch.max(surrogate, torch.tensor(objective.dual_clip * advantage, dtype=torch.float64))
        loss_sum = loss_sum - surrogate
    return loss_sum


def reference_update(
    old: Case, moved: Case, gate: GateConfig | None, objective: ObjectiveConfig, weighting: WeightingConfig
) -> Tensor:
    """Loss of a student that has moved since its batch was sampled: weights and rewards of `old`, a ratio to it."""
    with torch.no_grad():
        weights = gate_weights = old.reference(gate, objective, weighting).weight
        if weighting.name in ("entropy_aware", "tropd"):  # their forward KL has the gate's own
            gate_weights = old.reference(gate, objective).weight
    size, heat = moved.vocab_size, objective.temperature

    def student(case: Case) -> Tensor:
        return case.student_hidden.double() @ case.student_weight[:size].double().T / heat

    moved_NV, old_NV = student(moved), student(old).detach()
    teacher_NV = (old.teacher_hidden.double() @ old.teacher_weight[:size].double().T / heat).detach()
    sampled_ids_N = moved.sampled
    if objective.ends == "class":
        ids = moved.terminal_ids
        moved_NV, old_NV, teacher_NV = (with_one_end(whole_NV, ids) for whole_NV in (moved_NV, old_NV, teacher_NV))
        sampled_ids_N, size = as_one_end(moved.sampled, ids), moved_NV.shape[1]
    logs = old_NV.log_softmax(-1), teacher_NV.log_softmax(-1)
    credits = credits_of(objective, weights, old.offsets, sampled_ids_N, *logs)
    loss_sum = moved_NV.sum() * 0
    for t, y in enumerate(sampled_ids_N.tolist()):
        logp_V, old_V, logq_V = (row[t].log_softmax(-1) for row in (moved_NV, old_NV, teacher_NV))
        if objective.name in ("topk_reverse_kl", "sampled_token"):
            ids = [y] if objective.name == "sampled_token" else support_of(objective, old_NV[t], teacher_NV[t])
            share_K = torch.ones(len(ids), dtype=torch.float64) / max(len(ids), 1)
            if objective.name == "topk_reverse_kl" and objective.weight != "none" and ids:
                of = old_V if objective.weight == "student_p" else logq_V
                share_K = of[ids].exp() / of[ids].exp().sum()
            baseline = float((old_V.exp() * (old_V - logq_V)).sum()) if objective.baseline != "none" else 0.0
            rest = [v for v in range(size) if v not in ids]
            if objective.tail == "bucket":
                share_K = old_V[ids].exp()
                baseline = float((old_V[rest].exp().sum() / logq_V[rest].exp().sum()).log()) if rest else 0.0
            elif objective.tail == "centred" and ids:
                baseline = float((share_K * (old_V[ids] - logq_V[ids])).sum() / share_K.sum())
            for share, v in zip(share_K, ids, strict=True):
                reward = -weights[t] * share * (old_V[v] - logq_V[v] - baseline)
                if objective.discount:
                    reward = torch.tensor(credits[t], dtype=torch.float64)
                ratio = (logp_V[v] - old_V[v]).exp()
                surrogate = torch.min(ratio * reward, ratio.clamp(1 - objective.clip, 1 + objective.clip) * reward)
                if reward < 0:
                    surrogate = torch.max(surrogate, objective.dual_clip * reward)
                loss_sum = loss_sum - surrogate
        else:
            loss_sum = loss_sum + token_loss(objective, y, moved_NV[t], teacher_NV[t], weights[t])[0]
        uncertain = -(logq_V.exp() * logq_V).sum() > weighting.entropy_threshold
        if weighting.name == "entropy_aware" and uncertain:
            loss_sum = loss_sum + gate_weights[t] * forward_kl(
                logp_V, logq_V, top_ids(teacher_NV[t], weighting.forward_k)
            )
        if weighting.name == "tropd":
            untrusted = 1 - trust(weighting, float(logq_V[y] - old_V[y]))
            added = forward_kl(logp_V, logq_V, top_ids(teacher_NV[t], weighting.forward_k))
            loss_sum = loss_sum + gate_weights[t] * untrusted * added
    if old.advantage is not None:
        loss_sum = loss_sum + reference_reward(old, moved, objective)
    return loss_sum
