"""Every objective and weighting of the fused loss, on one rank, against the plain float64 reference."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prune_opd.config import GateConfig, ObjectiveConfig, WeightingConfig
from prune_opd.method.objective import token_loss
from tests.loss.checks import assert_agrees
from tests.reference import GATE, NO_WEIGHTING, OBJECTIVE, OBJECTIVES, VOCAB, WEIGHTINGS, describe, make_case


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 2e-5)])
@pytest.mark.parametrize("chunk", [7, 8])  # does not divide the 24 tokens, and does
@pytest.mark.parametrize("objective", OBJECTIVES, ids=describe)
def test_every_objective_support_and_weight_equals_the_reference(
    objective: ObjectiveConfig, chunk: int, dtype: torch.dtype, tolerance: float
) -> None:
    assert_agrees(make_case(), GATE, objective, dtype, tolerance, chunk=chunk)


@pytest.mark.parametrize("objective", OBJECTIVES, ids=describe)
def test_every_objective_equals_the_reference_at_a_temperature_without_a_gate(objective: ObjectiveConfig) -> None:
    assert_agrees(make_case(seed=1), None, dataclasses.replace(objective, temperature=0.7), chunk=7)


@pytest.mark.parametrize("name", ["topk_reverse_kl", "topk_forward_kl", "full_vocab_jsd", "sampled_k3"])
def test_the_teachers_temperature_can_be_its_own(name: str) -> None:
    objective = ObjectiveConfig(name, k=6, temperature=0.7, teacher_temperature=1.6)
    nucleus = GateConfig("teacher_top_p", k=9, w_drop=0.15, top_p=0.6)
    apart = assert_agrees(make_case(), nucleus, objective, chunk=7)
    together = make_case().fused(nucleus, dataclasses.replace(objective, teacher_temperature=None))[2]
    assert not torch.equal(apart.event_N, together.event_N)  # the gate sees the same teacher as the objective


@pytest.mark.parametrize("weighting", [NO_WEIGHTING, *WEIGHTINGS], ids=lambda weighting: weighting.name)
@pytest.mark.parametrize("discount", [0.5, 1.0])
@pytest.mark.parametrize("normalisation", ["none", "mean"])
def test_credit_for_later_tokens_has_their_own_weights_in_it(
    weighting: WeightingConfig, discount: float, normalisation: str
) -> None:
    gate = dataclasses.replace(GATE, weight_normalisation=normalisation)
    objective = ObjectiveConfig("sampled_token", k=6, discount=discount)
    assert_agrees(make_case(), gate, objective, weighting=weighting, chunk=5)
    assert_agrees(make_case(), None, objective, torch.float32, 2e-5, weighting, chunk=8)
    assert_agrees(make_case().stale(), gate, objective, weighting=weighting, chunk=5)


@given(
    st.lists(st.integers(0, 9), min_size=1, max_size=5).filter(sum),
    st.integers(1, 20),
    st.integers(1, 12),
    st.integers(1, 12),
    st.integers(0, 1000),
    st.sampled_from(OBJECTIVES),
    st.sampled_from([NO_WEIGHTING, *WEIGHTINGS]),
)
@settings(max_examples=40, deadline=None)
def test_ragged_and_empty_responses_equal_the_reference(
    lengths: list[int],
    chunk: int,
    gate_k: int,
    objective_k: int,
    seed: int,
    objective: ObjectiveConfig,
    weighting: WeightingConfig,
) -> None:
    gate, objective = dataclasses.replace(GATE, k=gate_k), dataclasses.replace(objective, k=objective_k)
    assert_agrees(make_case(tuple(lengths), seed), gate, objective, weighting=weighting, chunk=chunk)


@pytest.mark.parametrize("weighting", [NO_WEIGHTING, *WEIGHTINGS], ids=lambda weighting: weighting.name)
@pytest.mark.parametrize("objective", OBJECTIVES, ids=describe)
def test_a_student_that_equals_its_teacher_has_nothing_to_learn(
    objective: ObjectiveConfig, weighting: WeightingConfig
) -> None:
    """Except of a forward KL on the top-k alone, which wants the whole mass there: see the next test."""
    case = make_case().leaves(torch.float32)
    case.teacher_hidden, case.teacher_weight = case.student_hidden.detach(), case.student_weight.detach()
    loss, _, stats = case.fused(objective=objective, weighting=weighting, chunk=7)
    loss.backward()
    # With raw q it wants that mass too, at a value of 0; and a price outside the top-k is paid by the teacher itself.
    wants_mass = objective.name == "topk_forward_kl" and objective.renormalise != "both"
    costs = (wants_mass and objective.renormalise == "q") or objective.name == "priced_reverse_kl"
    pulled = wants_mass or costs or weighting.name == "entropy_aware"
    assert any(gradient.any() for gradient in case.gradients()) == pulled
    assert (loss.item() != 0) == (costs or weighting.name == "entropy_aware")
    assert bool(stats.divergence_N.any()) == costs


def test_a_forward_kl_on_every_token_id_is_that_of_the_vocabulary_and_leaves_a_twin_alone() -> None:
    objective = ObjectiveConfig("topk_forward_kl", k=VOCAB)
    assert_agrees(make_case(), GATE, objective, chunk=7)
    case = make_case().leaves(torch.float64)
    case.teacher_hidden, case.teacher_weight = case.student_hidden.detach(), case.student_weight.detach()
    loss = case.fused(objective=objective)[0]
    loss.backward()
    assert abs(loss.item()) < 1e-12
    assert all(gradient.abs().max() < 1e-12 for gradient in case.gradients())


def test_a_token_without_common_candidates_has_no_loss() -> None:
    case = make_case(lengths=(5,))
    case.teacher_hidden = torch.cat([-case.student_hidden, torch.zeros(5, 4).double()], 1)
    objective = ObjectiveConfig(k=6, support="intersection")
    leaves = case.leaves(torch.float64)
    loss, _, stats = leaves.fused(objective=objective)
    loss.backward()
    assert (stats.overlap_N == 0).all() and not stats.divergence_N.any()
    assert loss.item() == 0 and not any(gradient.any() for gradient in leaves.gradients())


@pytest.mark.parametrize("weighting", WEIGHTINGS, ids=lambda weighting: weighting.name)
@pytest.mark.parametrize("name", ["topk_reverse_kl", "sampled_token", "full_vocab_jsd"])
@pytest.mark.parametrize("normalisation", ["none", "mean"])
def test_every_weighting_beside_the_gate_equals_the_reference(
    weighting: WeightingConfig, name: str, normalisation: str
) -> None:
    gate = dataclasses.replace(GATE, weight_normalisation=normalisation)
    stats = assert_agrees(make_case(), gate, ObjectiveConfig(name, k=6), weighting=weighting, chunk=5)
    assert_agrees(make_case(), None, ObjectiveConfig(name, k=6), torch.float32, 2e-5, weighting, chunk=8)
    if weighting.name == "tip":
        assert (stats.weight_N[10:24] == 0).sum() == 14 - math.floor(0.4 * 14)
        assert stats.weight_N[9] > 0  # a response of one token keeps it


def test_iw_opd_falls_from_one_and_a_half_to_one_along_a_response() -> None:
    weight_N = make_case().fused(None, weighting=WeightingConfig("iw_opd"))[2].weight_N
    for begin, end in ((0, 9), (10, 24)):
        row = weight_N[begin:end]
        assert row[0] == 1.5 and row[-1] > 1 and (row.diff() < 0).all()


def test_entropy_aware_adds_nothing_where_the_teacher_is_sure_and_everywhere_where_it_never_is() -> None:
    case, forward = make_case(), ObjectiveConfig("topk_forward_kl", k=9)
    losses = {
        threshold: case.fused(weighting=WeightingConfig("entropy_aware", threshold, forward_k=9))[0].item()
        for threshold in (0.0, 100.0)
    }
    assert losses[100.0] == case.fused()[0].item()
    assert losses[0.0] == pytest.approx(case.fused()[0].item() + case.fused(objective=forward)[0].item())


def test_the_objective_is_the_policy_gradient_of_method_md() -> None:
    """Worked by hand: p = (.6, .2), so w = (.75, .25); log p − log q = (log 2, 0); W = 2."""
    student_logp, teacher_logp = torch.tensor([[0.6, 0.2]]).log(), torch.tensor([[0.3, 0.2]]).log()
    got = token_loss(OBJECTIVE, student_logp, teacher_logp, torch.tensor([2.0]))
    assert got.reward_NK is not None and got.reward_NK[0].tolist() == pytest.approx([-1.5 * math.log(2), 0])
    assert got.loss_N.tolist() == pytest.approx([1.5 * math.log(2) * math.log(0.6)])
    assert torch.equal(got.grad_logp_NK, -got.reward_NK)
    assert got.divergence_N.tolist() == pytest.approx([0.75 * math.log(2)])


def test_the_weight_none_is_uniform_over_what_a_token_has_of_a_support() -> None:
    """Worked by hand: p = (.6, .2, .1), q = (.3, .2, .4); all three count, then two, one, and none of them."""
    logs = [torch.tensor([row]).double().log().expand(4, 3) for row in ([0.6, 0.2, 0.1], [0.3, 0.2, 0.4])]
    valid_NK = torch.tensor([[True, True, True], [True, False, True], [False, True, False], [False, False, False]])
    objective = ObjectiveConfig(support="intersection", weight="none")
    got = token_loss(objective, *logs, torch.ones(4).double(), valid_NK)
    two, fourth = math.log(2), math.log(1 / 4)
    expected = [[two / 3, 0, fourth / 3], [two / 2, 0, fourth / 2], [0, 0, 0], [0, 0, 0]]
    torch.testing.assert_close(got.grad_logp_NK, torch.tensor(expected).double())
    torch.testing.assert_close(got.divergence_N, torch.tensor(expected).double().sum(1))
