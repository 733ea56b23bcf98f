"""Divergences beside the published objective: worked by hand, against autograd, and what their settings refuse."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from prune_opd.config import ObjectiveConfig
from prune_opd.errors import ConfigError
from prune_opd.method.credit import discounted_credit
from prune_opd.method.divergences import DIVERGENCES
from prune_opd.method.objective import token_loss


def logs(*rows: list[float]) -> list[Tensor]:
    return [torch.tensor([row], dtype=torch.float64).log() for row in rows]


def found(objective: ObjectiveConfig, p: list[float], q: list[float]) -> tuple[float, list[float]]:
    """Value and slopes of one token."""
    value_N, slope_NK = DIVERGENCES[objective.name](*logs(p, q), objective)
    return value_N.item(), slope_NK[0].tolist()


# ---------------------------------------------------------------------------------------------------- by hand


def test_the_forward_kl_on_the_top_k_renormalises_what_it_is_told_to() -> None:
    """Worked by hand: p = (.6, .2), q = (.3, .1), so p̄ = q̄ = (.75, .25)."""
    for renormalise, value, slope in (
        ("none", 0.4 * math.log(0.5), [-0.3, -0.1]),
        ("q", 0.75 * math.log(0.75 / 0.6) + 0.25 * math.log(0.25 / 0.2), [-0.75, -0.25]),
        ("both", 0.0, [0.0, 0.0]),
    ):
        objective = ObjectiveConfig("topk_forward_kl", renormalise=renormalise)  # type: ignore[arg-type]
        got_value, got_slope = found(objective, [0.6, 0.2], [0.3, 0.1])
        assert got_value == pytest.approx(value, abs=1e-15) and got_slope == pytest.approx(slope, abs=1e-15)


def test_the_mixed_kl_and_the_jsd_on_the_top_k_are_those_of_the_renormalised_models() -> None:
    """Worked by hand: p̄ = (.8, .2), q̄ = (.5, .5), so m = .25 q̄ + .75 p̄ = (.725, .275)."""
    p, q = [0.4, 0.1], [0.2, 0.2]
    forward = 0.5 * math.log(0.5 / 0.8) + 0.5 * math.log(0.5 / 0.2)
    reverse = 0.8 * math.log(0.8 / 0.5) + 0.2 * math.log(0.2 / 0.5)
    mixed = found(ObjectiveConfig("topk_mixed_kl", forward_share=0.25), p, q)[0]
    assert mixed == pytest.approx(0.25 * forward + 0.75 * reverse)
    teacher = 0.5 * math.log(0.5 / 0.725) + 0.5 * math.log(0.5 / 0.275)
    student = 0.8 * math.log(0.8 / 0.725) + 0.2 * math.log(0.2 / 0.275)
    assert found(ObjectiveConfig("topk_jsd", beta=0.25), p, q)[0] == pytest.approx(0.25 * teacher + 0.75 * student)


@pytest.mark.parametrize(("name", "value", "slope"), [("sampled_k2", 0.5, 1.0), ("sampled_k3", math.exp(-1), None)])
def test_the_estimators_of_the_sampled_token(name: str, value: float, slope: float | None) -> None:
    """Worked by hand: log p = −1, log q = −2, so δ = 1."""
    at = torch.tensor([[-1.0]]).double(), torch.tensor([[-2.0]]).double()
    got = DIVERGENCES[name](*at, ObjectiveConfig(name))
    assert got.value_N.item() == pytest.approx(value)
    assert got.slope_NK.item() == pytest.approx(1 - math.exp(-1) if slope is None else slope)


def test_a_clamp_holds_the_value_and_takes_the_gradient() -> None:
    """Worked by hand, with log-probabilities of −1, −12 and −14 and verl's clamps of −10 and 10."""
    k2 = ObjectiveConfig("sampled_k2", logp_min=-10.0, loss_max=10.0)
    student, teacher = (torch.tensor(values).double()[:, None] for values in ([-1.0, -1.0, -12.0], [-2.0, -14.0, -1.0]))
    got = token_loss(k2, student, teacher, torch.full((3,), 2.0).double())
    # δ = 1; δ = 9, whose half square is above 10; δ = −9, of a student that is itself below −10.
    assert got.divergence_N.tolist() == pytest.approx([0.5, 10.0, 10.0])
    assert got.grad_logp_NK[:, 0].tolist() == [2.0, 0.0, 0.0]
    floor = ObjectiveConfig("sampled_k2", logp_min=-10.0)
    got = token_loss(floor, student, teacher, torch.ones(3).double())
    assert got.divergence_N.tolist() == pytest.approx([0.5, 40.5, 40.5])
    assert got.grad_logp_NK[:, 0].tolist() == [1.0, 9.0, 0.0]


def test_k2_has_the_gradient_of_the_policy_gradient_and_k3_in_mean_that_of_the_forward_kl() -> None:
    generator = torch.Generator().manual_seed(0)
    student_NV, teacher_NV = torch.randn(2, 1, 7, generator=generator).double().log_softmax(-1)
    every_V1 = [part[0, :, None] for part in (student_NV, teacher_NV)]  # each id as the sampled one
    one_V, p_V = torch.ones(7).double(), student_NV[0].exp()
    by_k1 = token_loss(ObjectiveConfig("sampled_token"), *every_V1, one_V).grad_logp_NK
    by_k2 = token_loss(ObjectiveConfig("sampled_k2"), *every_V1, one_V).grad_logp_NK
    torch.testing.assert_close(by_k1, by_k2)
    # E_y c(y) ∇ log p(y) = Σ_v p_v c_v (1_v − p): of both the same, in the logits.
    by_k3 = token_loss(ObjectiveConfig("sampled_k3"), *every_V1, one_V).grad_logp_NK[:, 0]
    torch.testing.assert_close(p_V * (by_k3 - (p_V * by_k3).sum()), p_V - teacher_NV[0].exp())


# ---------------------------------------------------------------------------------------------------- credit


@pytest.mark.parametrize("discount", [0.0, 0.5, 0.99, 1.0])
def test_credit_is_the_discounted_sum_of_what_follows_in_the_same_response(discount: float) -> None:
    offsets = [0, 0, 1, 8, 8, 21, 23]
    reward_N = torch.randn(23, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = []
    for begin, end in pairwise(offsets):
        expected += [sum(discount ** (s - t) * float(reward_N[s]) for s in range(t, end)) for t in range(begin, end)]
    assert discounted_credit(reward_N, offsets, discount).tolist() == pytest.approx(expected)
    assert discounted_credit(reward_N[:0], [0, 0], discount).shape == discounted_credit(reward_N[:0], [0], 1.0).shape


# ---------------------------------------------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "topk_reverse_kl", "beta": 0.1}, "beta = 0.1 is a setting of full_vocab_jsd and topk_jsd, and"),
        ({"name": "topk_jsd", "forward_share": 0.1}, "forward_share = 0.1 is a setting of full_vocab_mixed_kl and"),
        ({"name": "topk_jsd", "renormalise": "both"}, "renormalise = 'both' is a setting of topk_forward_kl, and"),
        ({"name": "sampled_token", "loss_max": 10.0}, "loss_max = 10.0 is a setting of sampled_k2 and sampled_k3 and"),
        ({"name": "sampled_k3", "discount": 0.9}, "discount = 0.9 is a setting of sampled_token, and"),
        ({"name": "topk_jsd", "outside_logp": -9.0}, "outside_logp = -9.0 is a setting of priced_reverse_kl, and"),
        ({"name": "sampled_k3", "logp_min": 0.0}, "logp_min = 0.0"),
        ({"name": "sampled_k3", "loss_max": -1.0}, "loss_max = -1.0"),
        ({"name": "sampled_token", "discount": 1.1}, "discount = 1.1"),
        ({"name": "topk_mixed_kl", "forward_share": 1.0}, "forward_share = 1.0"),
        ({"name": "priced_reverse_kl", "outside_logp": 0.0}, "outside_logp = 0.0"),
        ({"teacher_temperature": 0.0}, "teacher_temperature = 0.0"),
    ],
)
def test_a_setting_that_an_objective_has_not_or_that_is_out_of_range_is_named(
    settings: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigError, match=f"objective.{message}"):
        ObjectiveConfig(**settings)  # type: ignore[arg-type]
