"""The gate inside the fused loss, on one rank, against the plain float64 reference."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from prune_opd.config import GateConfig, ObjectiveConfig
from prune_opd.method.gate import overlap_ratio
from tests.loss.checks import assert_agrees
from tests.reference import GATE, OBJECTIVES, VOCAB, describe, make_case


@pytest.mark.parametrize(
    "gate",
    [
        None,
        dataclasses.replace(GATE, weight_normalisation="base"),
        dataclasses.replace(GATE, weight_normalisation="mean"),
        dataclasses.replace(GATE, weight_normalisation="mean", w_base=0.0, w_drop=1.0),
        dataclasses.replace(GATE, w_base=0.0),
        dataclasses.replace(GATE, k=3),
        dataclasses.replace(GATE, k=11),
        dataclasses.replace(GATE, metric="teacher_top_p", top_p=0.6),
        dataclasses.replace(GATE, metric="teacher_top_p", top_p=1.0, k=20),
        dataclasses.replace(GATE, metric="acceptance"),
        dataclasses.replace(GATE, metric="shared_mass", k=11),
        dataclasses.replace(GATE, metric="change_point", alarm=3.0),
        dataclasses.replace(GATE, metric="kl_agreement", low_tokens=4, threshold=1.0),
        dataclasses.replace(GATE, memory=False),
        dataclasses.replace(GATE, metric="change_point", alarm=3.0, weight_normalisation="mean"),
    ],
    ids=lambda gate: (
        "no gate" if gate is None else f"{gate.metric}-{gate.weight_normalisation}-k{gate.k}-b{gate.w_base:g}"
    ),
)
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_every_gate_setting_equals_the_reference(gate: GateConfig | None, temperature: float) -> None:
    assert_agrees(make_case(), gate, ObjectiveConfig(k=6, temperature=temperature), chunk=7)


@pytest.mark.parametrize("objective", OBJECTIVES, ids=describe)
def test_a_response_whose_every_token_is_an_event_equals_the_reference(objective: ObjectiveConfig) -> None:
    case = make_case()
    case.teacher_hidden = case.teacher_hidden.clone()
    case.teacher_hidden[10:24] *= -1  # the last response: the teacher wants the opposite
    gate = dataclasses.replace(GATE, w_base=0.0)
    stats = assert_agrees(case, gate, objective, chunk=4)
    assert stats.event_N[10:24].all()
    assert (stats.weight_N[16:24] == 0).all()
    assert stats.reliable_length_B[3] == math.ceil(1 / GATE.w_drop) - 1


def test_a_teacher_equal_to_the_student_gives_no_events_no_loss_and_no_gradient() -> None:
    case = make_case().leaves(torch.float32)
    case.teacher_hidden, case.teacher_weight = case.student_hidden.detach(), case.student_weight.detach()
    loss, _, stats = case.fused()
    loss.backward()
    assert (stats.overlap_N == 1).all() and not stats.event_N.any()
    assert (stats.weight_N == 1.5).all()
    assert torch.equal(stats.reliable_length_B, stats.length_B)
    assert loss.item() == 0
    assert not any(gradient.any() for gradient in case.gradients())


def test_overlap_without_a_gate_is_measured_with_the_objectives_k() -> None:
    case = make_case()
    stats = case.fused(None, ObjectiveConfig(k=4))[2]
    ids = [
        (h @ w[:VOCAB].T).topk(4).indices
        for h, w in ((case.student_hidden, case.student_weight), (case.teacher_hidden, case.teacher_weight))
    ]
    assert torch.equal(stats.overlap_N, overlap_ratio(*ids))
    assert not stats.event_N.any() and (stats.weight_N == 1).all() and (stats.reliability_N == 1).all()
