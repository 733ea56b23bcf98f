"""vOPD's baseline for the sampled token: the mean gradient stays, to the last digit, and its variance falls."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from prune_opd.config import ObjectiveConfig
from prune_opd.errors import ConfigError
from tests.reference import VOCAB, Case, make_case

PLAIN = ObjectiveConfig("sampled_token", k=6)
LESS_MEAN = dataclasses.replace(PLAIN, baseline="reverse_kl")


def every_token(case: Case, t: int) -> Case:
    """Token t of a batch, once with each token that could have been sampled there."""
    rows = torch.full((VOCAB,), t)
    return dataclasses.replace(
        case,
        student_hidden=case.student_hidden[rows],
        teacher_hidden=case.teacher_hidden[rows],
        sampled=torch.arange(VOCAB),
        offsets=[0, VOCAB],
    )


def gradients(case: Case, objective: ObjectiveConfig) -> Tensor:
    """Of the student's hidden state, [VOCAB, H]: a row for each token that is sampled."""
    leaves = case.leaves(torch.float64)
    leaves.fused(None, objective)[0].backward()
    return leaves.gradients()[0]


def probabilities(case: Case, student: Tensor) -> Tensor:
    return (student @ case.student_weight[:VOCAB].T).log_softmax(-1)


@pytest.mark.parametrize("t", (0, 9, 23))
def test_the_mean_gradient_over_all_tokens_is_that_of_the_reverse_kl_with_and_without(t: int) -> None:
    case = every_token(make_case(), t)
    hidden_H = case.student_hidden[0].clone().requires_grad_()
    logp_V = probabilities(case, hidden_H)
    logq_V = (case.teacher_hidden[0] @ case.teacher_weight[:VOCAB].T).log_softmax(-1)
    (exact_H,) = torch.autograd.grad((logp_V.exp() * (logp_V - logq_V)).sum(), hidden_H)
    p_V1 = logp_V.detach().exp().unsqueeze(1)
    for objective in (PLAIN, LESS_MEAN):
        mean_H = (p_V1 * gradients(case, objective)).sum(0)
        torch.testing.assert_close(mean_H, exact_H, rtol=1e-12, atol=1e-12)


def test_its_variance_on_a_frozen_batch_is_lower() -> None:
    """Exact, over all tokens at each of the batch's positions; the sum over positions and coordinates."""
    case = make_case()
    variance = dict.fromkeys((PLAIN, LESS_MEAN), 0.0)
    for t in range(case.offsets[-1]):
        of_token = every_token(case, t)
        p_V1 = probabilities(of_token, of_token.student_hidden[0]).exp().unsqueeze(1)
        for objective in variance:
            grad_VH = gradients(of_token, objective)
            variance[objective] += float((p_V1 * (grad_VH - (p_V1 * grad_VH).sum(0)) ** 2).sum())
    assert variance[LESS_MEAN] < 0.9 * variance[PLAIN], variance


def test_with_a_discount_only_the_tokens_own_reward_has_a_baseline() -> None:
    case = make_case()
    later, both = (dataclasses.replace(objective, discount=0.9) for objective in (PLAIN, LESS_MEAN))
    rewards = {}
    for objective in (PLAIN, LESS_MEAN, later, both):
        policy = case.fused(None, objective, policy="keep")[2].policy
        assert policy is not None and policy.reward_NK is not None
        rewards[objective] = policy.reward_NK
    torch.testing.assert_close(rewards[both] - rewards[later], rewards[LESS_MEAN] - rewards[PLAIN])


def test_it_is_a_setting_of_the_sampled_token() -> None:
    with pytest.raises(ConfigError, match=r"objective\.baseline = 'reverse_kl' is a setting of sampled_token"):
        ObjectiveConfig("topk_reverse_kl", baseline="reverse_kl")
