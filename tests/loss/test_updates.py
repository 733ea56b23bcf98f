"""Several updates with one batch: what stays fixed of the policy that sampled it, the clipped ratio, the statistics."""

from __future__ import annotations

import math

import pytest
import torch

from prune_opd.config import GateConfig, ObjectiveConfig, WeightingConfig
from prune_opd.loss.stats import BatchStats
from prune_opd.method.objective import clipped_policy_loss, has_rewards
from tests.reference import (
    GATE,
    NO_WEIGHTING,
    OBJECTIVE,
    OBJECTIVES,
    WEIGHTINGS,
    describe,
    make_case,
)
from tests.reference_update import reference_update

POLICY_GRADIENTS = [objective for objective in OBJECTIVES if has_rewards(objective)]


# ---------------------------------------------------------------------------------------------------- the ratio


@pytest.mark.parametrize(
    ("ratio", "reward", "loss", "clipped"),
    [
        (1.0, 2.0, -2.0, False),
        (1.1, 2.0, -2.2, False),
        (1.5, 2.0, -2.4, True),  # enough of a good thing
        (0.5, 2.0, -1.0, False),  # on the way back to it
        (1.5, -2.0, 3.0, False),  # away from a bad thing
        (0.5, -2.0, 1.6, True),  # far enough away
        (5.0, -2.0, 6.0, True),  # dual clip: never more than three times the reward
        (1e9, 0.0, 0.0, False),
    ],
)
def test_the_ratio_is_clipped_on_the_side_where_the_update_has_gone_far_enough(
    ratio: float, reward: float, loss: float, clipped: bool
) -> None:
    old = torch.tensor([[-3.0]], dtype=torch.float64)
    got = clipped_policy_loss(OBJECTIVE, old + math.log(ratio), old, torch.tensor([[reward]], dtype=torch.float64))
    assert got.loss_N.item() == pytest.approx(loss)
    assert got.clipped_NK.item() == clipped
    assert got.grad_logp_NK.item() == pytest.approx(0 if clipped else -ratio * reward)


def test_the_gradient_of_the_clipped_loss_is_that_of_autograd() -> None:
    generator = torch.Generator().manual_seed(0)
    old, moved, reward = torch.randn(3, 400, 1, generator=generator, dtype=torch.float64).unbind()
    logp = (old + moved).requires_grad_()
    got = clipped_policy_loss(OBJECTIVE, logp.detach(), old, reward)
    ratio = (logp - old).exp()
    surrogate = torch.min(ratio * reward, ratio.clamp(0.8, 1.2) * reward)
    surrogate = torch.where(reward < 0, torch.max(surrogate, 3 * reward), surrogate)
    (-surrogate.sum()).backward()
    assert torch.allclose(got.loss_N, -surrogate.sum(1).detach(), rtol=1e-12)
    assert logp.grad is not None and torch.allclose(got.grad_logp_NK, logp.grad, rtol=1e-12)
    assert 0.2 < got.clipped_NK.double().mean() < 0.8


def test_the_clips_are_settings() -> None:
    old, reward = torch.zeros(1, 1), torch.tensor([[1.0]])
    wide = ObjectiveConfig(clip=0.5, dual_clip=10.0)
    assert clipped_policy_loss(wide, old + math.log(1.4), old, reward).loss_N.item() == pytest.approx(-1.4)
    assert clipped_policy_loss(wide, old + math.log(9.0), old, -reward).loss_N.item() == pytest.approx(9.0)


# ---------------------------------------------------------------------------------------------------- the fused loss


# Every objective with every weighting in float64; in fp32 without one and with one.
MOVED = [
    pytest.param(objective, weighting, *rounding, id=f"{describe(objective)}-{weighting.name}-{rounding[0]}")
    for i, objective in enumerate(OBJECTIVES)
    for weighting in (NO_WEIGHTING, *WEIGHTINGS)
    for rounding in ((torch.float64, 1e-9), (torch.float32, 2e-5))
    if rounding[0] == torch.float64 or weighting in (NO_WEIGHTING, WEIGHTINGS[i % len(WEIGHTINGS)])
]


@pytest.mark.parametrize(("objective", "weighting", "dtype", "tolerance"), MOVED)
def test_a_moved_student_is_held_against_the_policy_that_sampled_the_batch(
    objective: ObjectiveConfig, weighting: WeightingConfig, dtype: torch.dtype, tolerance: float
) -> None:
    case = make_case().leaves(dtype)
    with torch.no_grad():
        before = case.fused(GATE, objective, weighting=weighting, policy="keep", chunk=7)[2]
    moved = case.moved().leaves(dtype)
    expected = moved.leaves(torch.float64)
    loss, _, stats = moved.fused(GATE, objective, weighting=weighting, policy=before.policy, chunk=5)
    loss.backward()
    reference = reference_update(case.leaves(torch.float64), expected, GATE, objective, weighting)
    reference.backward()
    assert abs(loss.item() - reference.item()) <= tolerance * max(1, abs(reference.item()))
    for got, wanted in zip(moved.gradients(), expected.gradients(), strict=True):
        assert (got.double() - wanted).abs().max() <= tolerance * wanted.abs().max()
    assert torch.equal(stats.weight_N, before.weight_N)
    assert (stats.ratio_N is not None) == has_rewards(objective)
    if stats.ratio_N is not None and stats.clipped_N is not None and objective.support != "intersection":
        assert 0 < stats.clipped_N.mean() < 1 and (stats.ratio_N != 1).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("gate", [GATE, None], ids=["gate", "no gate"])
@pytest.mark.parametrize("objective", POLICY_GRADIENTS, ids=describe)
def test_before_the_first_update_the_ratio_is_exactly_one_and_the_gradient_the_same_bits(
    objective: ObjectiveConfig, gate: GateConfig | None, dtype: torch.dtype
) -> None:
    once, again = make_case().leaves(dtype), make_case().leaves(dtype)
    loss, _, stats = once.fused(gate, objective, policy="keep", chunk=7)
    loss.backward()
    held, _, ratios = again.fused(gate, objective, policy=stats.policy, chunk=7)
    held.backward()
    for got, expected in zip(again.gradients(), once.gradients(), strict=True):
        assert torch.equal(got, expected)
    assert ratios.ratio_N is not None and ratios.clipped_N is not None
    assert (ratios.ratio_N == 1).all() and not ratios.clipped_N.any()
    # Its value is −Σ_j r_j: without a baseline the weighted divergence.
    assert stats.policy is not None and stats.policy.reward_NK is not None
    assert held.item() == pytest.approx(-stats.policy.reward_NK.double().sum().item(), rel=1e-5, abs=1e-5)
    if objective.tail == "none" and not objective.discount and objective.baseline == "none":
        weighted = (stats.weight_N * stats.divergence_N).double().sum().item()
        assert held.item() == pytest.approx(weighted, rel=1e-5, abs=1e-6)


def test_keeping_the_policy_changes_nothing() -> None:
    plain, keeping = make_case().leaves(torch.float32), make_case().leaves(torch.float32)
    loss, _, stats = plain.fused()
    kept, _, more = keeping.fused(policy="keep")
    loss.backward()
    kept.backward()
    assert torch.equal(loss, kept) and stats.policy is None and more.policy is not None
    assert all(torch.equal(a, b) for a, b in zip(plain.gradients(), keeping.gradients(), strict=True))


def test_the_policy_of_no_tokens_is_empty_and_serves_later_updates() -> None:
    case = make_case(lengths=(0, 0)).leaves(torch.float32)
    policy = case.fused(policy="keep", weighting=WeightingConfig("iw_opd"))[2].policy
    assert policy is not None and len(policy.weights[0]) == len(policy.logp_NK) == 0
    loss, tokens, stats = case.fused(policy=policy, weighting=WeightingConfig("iw_opd"))
    assert (loss.item(), tokens) == (0, 0)
    assert stats.ratio_N is not None and len(stats.ratio_N) == 0


# ---------------------------------------------------------------------------------------------------- the log


def test_ratio_and_clip_fraction_are_token_means_and_only_there_when_there_was_a_ratio() -> None:
    case = make_case()
    stats = BatchStats(5, 4, 32, torch.device("cpu"))
    before = case.fused(policy="keep")[2]
    stats.add(range(5), before)
    assert not {"ratio_mean", "clip_fraction"} & stats.record().keys()
    after = case.moved().fused(policy=before.policy)[2]
    assert after.ratio_N is not None and after.clipped_N is not None
    stats.add_ratio(after)
    stats.add_ratio(before)  # has no ratio
    record = stats.record()
    assert record["ratio_mean"] == pytest.approx(after.ratio_N.mean().item())
    assert record["clip_fraction"] == pytest.approx(after.clipped_N.mean().item())
    assert record["overlap"] == pytest.approx(before.overlap_N.mean().item())
