"""A task's reward beside distillation: its policy gradient is added, and nothing of the distillation changes."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from prune_opd.config import ObjectiveConfig
from prune_opd.loss.stats import GateStats
from tests.ending import ending_case
from tests.reference import (
    GATE,
    NO_WEIGHTING,
    OBJECTIVE,
    OBJECTIVES,
    WEIGHTINGS,
    Case,
    describe,
    make_case,
)
from tests.reference_update import reference_reward, reference_update

TOLERANCE = {"rtol": 1e-9, "atol": 1e-10}


def with_gradients(case: Case, loss_sum: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    loss_sum.backward()
    hidden, weight = case.gradients()
    return loss_sum.detach(), hidden, weight


def fused(case: Case, objective: ObjectiveConfig, **options: object) -> tuple[tuple[Tensor, ...], GateStats]:
    leaves = case.leaves(torch.float64)
    loss_sum, _, stats = leaves.fused(objective=objective, chunk=4, **options)  # type: ignore[arg-type]
    return with_gradients(leaves, loss_sum), stats


def of_reward(case: Case, objective: ObjectiveConfig, old: Case | None = None) -> tuple[Tensor, ...]:
    leaves = case.leaves(torch.float64)
    return with_gradients(leaves, reference_reward(old or leaves, leaves, objective))


def assert_sum(got: tuple[Tensor, ...], *terms: tuple[Tensor, ...]) -> None:
    """got: loss and both gradients. Each is the sum of the terms'."""
    for value, *parts in zip(got, *terms, strict=True):
        torch.testing.assert_close(value, sum(parts[1:], parts[0]), **TOLERANCE)


@pytest.mark.parametrize("objective", OBJECTIVES, ids=describe)
def test_the_loss_is_that_of_distillation_and_that_of_the_reward(objective: ObjectiveConfig) -> None:
    plain = make_case()
    case = plain.rewarded()
    (got, seen), (distilled, before) = fused(case, objective), fused(plain, objective)
    assert_sum(got, distilled, of_reward(case, objective))
    for field in dataclasses.fields(GateStats):  # the gate, the divergence and all statistics stay as they were
        mine, theirs = getattr(seen, field.name), getattr(before, field.name)
        assert (mine is None) == (theirs is None) and (mine is None or torch.equal(mine, theirs)), field.name


@pytest.mark.parametrize("weighting", WEIGHTINGS, ids=lambda weighting: weighting.name)
@pytest.mark.parametrize("name", ("topk_reverse_kl", "full_vocab_reverse_kl"))
def test_neither_gate_nor_weighting_weighs_the_reward(name: str, weighting: object) -> None:
    objective, plain = ObjectiveConfig(name, k=6), make_case()
    case = plain.rewarded()
    got, _ = fused(case, objective, weighting=weighting)
    distilled, _ = fused(plain, objective, weighting=weighting)
    assert_sum(got, distilled, of_reward(case, objective))


@pytest.mark.parametrize("name", ("topk_reverse_kl", "full_vocab_reverse_kl", "sampled_token"))
def test_the_reward_of_stale_tokens_is_corrected_as_their_distillation_is(name: str) -> None:
    objective, plain = ObjectiveConfig(name, k=6), make_case().stale()
    case = plain.rewarded()
    assert_sum(fused(case, objective)[0], fused(plain, objective)[0], of_reward(case, objective))


@pytest.mark.parametrize("name", ("topk_reverse_kl", "full_vocab_reverse_kl"))
def test_with_one_class_of_ends_the_reward_is_of_the_class(name: str) -> None:
    objective, plain = ObjectiveConfig(name, k=4, ends="class"), ending_case()
    case = plain.rewarded()
    assert_sum(fused(case, objective)[0], fused(plain, objective)[0], of_reward(case, objective))


@pytest.mark.parametrize("objective", OBJECTIVES, ids=describe)
def test_later_updates_take_the_clipped_ratio_to_the_policy_that_sampled(objective: ObjectiveConfig) -> None:
    plain = make_case()
    old = plain.rewarded()
    _, _, stats = old.fused(objective=objective, chunk=4, policy="keep")
    moved = old.moved()
    (got, seen) = fused(moved, objective, policy=stats.policy)
    leaves = moved.leaves(torch.float64)
    distilled = with_gradients(leaves, reference_update(plain, leaves, GATE, objective, NO_WEIGHTING))
    assert_sum(got, distilled, of_reward(moved, objective, old))
    assert seen.ratio_N is not None and seen.clipped_N is not None and 0 < seen.clipped_N.mean() < 1


def test_no_advantage_is_no_gradient_and_a_wrong_shape_is_named() -> None:
    plain = make_case()
    nothing = dataclasses.replace(plain, advantage=torch.zeros(len(plain.sampled)))
    for mine, theirs in zip(fused(nothing, OBJECTIVE)[0], fused(plain, OBJECTIVE)[0], strict=True):
        assert torch.equal(mine, theirs)
    with pytest.raises(ValueError, match=r"advantage is \[2\] and sampled_ids \[24\]: give one number for each"):
        dataclasses.replace(plain, advantage=torch.zeros(2)).fused()


def test_in_bf16_the_reward_is_as_exact_as_its_logits() -> None:
    case = make_case((40, 3, 61)).rewarded()
    low = case.leaves(torch.bfloat16)
    loss_sum, _, _ = low.fused(gate=None, objective=ObjectiveConfig("full_vocab_reverse_kl", k=6))
    _, hidden, weight = with_gradients(low, loss_sum)
    same = dataclasses.replace(
        case, **{name: getattr(low, name).detach().double() for name in ("student_hidden", "student_weight")}
    )
    same = dataclasses.replace(
        same, **{name: getattr(low, name).double() for name in ("teacher_hidden", "teacher_weight")}
    ).leaves(torch.float64)
    loss_sum, _, _ = same.fused(gate=None, objective=ObjectiveConfig("full_vocab_reverse_kl", k=6))
    _, exact_hidden, exact_weight = with_gradients(same, loss_sum)
    for mine, exact in ((hidden, exact_hidden), (weight, exact_weight)):
        assert (mine.double() - exact).norm() / exact.norm() < 0.01
