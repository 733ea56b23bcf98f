"""The drift gate: hand-worked values of method.md §2, and what must hold for every response."""

from __future__ import annotations

from random import Random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from prune_opd.config import GateConfig
from prune_opd.method.gate import (
    PackedGate,
    Views,
    apply_gate,
    apply_gate_packed,
    judge,
    overlap_events,
    overlap_ratio,
    top_p_reject,
)

quick = settings(max_examples=60, deadline=None)

gates = st.builds(
    GateConfig,
    w_drop=st.one_of(st.sampled_from([0.0, 0.01, 0.1, 1 / 3, 0.3, 1.0]), st.floats(1e-6, 1)),
    w_base=st.sampled_from([0.0, 0.5, 2.0]),
    weight_normalisation=st.sampled_from(["none", "base", "mean"]),
)


@st.composite
def rows(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """Events and lengths of up to six responses, some empty; events in the padding too, where they must not count."""
    count, width = draw(st.integers(1, 6)), draw(st.integers(1, 40))
    length_B = torch.tensor(draw(st.lists(st.integers(0, width), min_size=count, max_size=count)))
    rate = draw(st.sampled_from([0.05, 0.5, 1.0]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    return torch.rand(count, width, generator=generator) < rate, length_B


def valid_of(event_BT: Tensor, length_B: Tensor) -> Tensor:
    return torch.arange(event_BT.shape[1]) < length_B[:, None]


# ---------------------------------------------------------------------------------------------------- events


def test_overlap_counts_shared_ids_in_any_order() -> None:
    student = torch.tensor([[[1, 2, 3, 4], [1, 2, 3, 4], [1, 2, 3, 4]]])
    teacher = torch.tensor([[[4, 3, 2, 1], [9, 1, 8, 4], [5, 6, 7, 8]]])
    overlap_BT = overlap_ratio(student, teacher)
    assert overlap_BT.tolist() == [[1.0, 0.5, 0.0]]
    assert overlap_BT.dtype == torch.float32
    assert overlap_ratio(student[0, 0], teacher[0, 1]).item() == 0.5


@pytest.mark.parametrize(
    ("k", "threshold", "last_event"),
    [(16, 0.7, 11), (10, 0.7, 6), (20, 0.55, 10), (5, 0.6, 2), (7, 1.0, 6), (3, 0.0, -1), (100, 0.29, 28)],
)
def test_an_event_is_an_overlap_strictly_below_the_threshold(k: int, threshold: float, last_event: int) -> None:
    teacher_ids = torch.arange(k)
    for shared in range(k + 1):
        student_ids = torch.cat([torch.arange(shared), 1000 + torch.arange(k - shared)])
        event = overlap_events(overlap_ratio(student_ids, teacher_ids), k, threshold)
        assert event.dtype == torch.bool
        assert event.item() == (shared <= last_event), shared


def test_the_nucleus_ends_with_the_token_that_reaches_p() -> None:
    teacher_ids = torch.tensor([7, 3, 9, 1])
    teacher_logp = torch.tensor([0.5, 0.3, 0.15, 0.04]).log()
    sampled = torch.tensor([7, 3, 9, 1, 5])
    for p, rejected in ((0.95, [1, 5]), (0.951, [5]), (0.8, [9, 1, 5]), (0.5, [3, 9, 1, 5]), (0.01, [3, 9, 1, 5])):
        event = top_p_reject(sampled, teacher_ids.expand(5, 4), teacher_logp.expand(5, 4), p)
        assert sampled[event].tolist() == rejected, p


def test_the_nucleus_is_all_k_when_p_is_never_reached() -> None:
    teacher_ids, teacher_logp = torch.tensor([[7, 3]]), torch.tensor([[0.3, 0.2]]).log()
    for sampled, rejected in ((7, False), (3, False), (4, True)):
        assert top_p_reject(torch.tensor([sampled]), teacher_ids, teacher_logp, 0.95).item() == rejected


def views(student_p: list[list[float]], teacher_p: list[list[float]], sampled: list[int]) -> Views:
    """The top 2 of both models, from whole distributions."""
    student_NV, teacher_NV = torch.tensor(student_p), torch.tensor(teacher_p)
    student, teacher = student_NV.topk(2), teacher_NV.topk(2)
    there = teacher_NV.gather(1, student.indices).log()
    logs = student.values.log(), teacher.values.log()
    return Views(torch.tensor(sampled), student.indices, torch.stack([logs[0], there]), teacher.indices, logs[1])


# Three tokens over four ids. The models agree; share one id of two; share none.
VIEWS = views(
    [[0.6, 0.3, 0.06, 0.04], [0.6, 0.3, 0.06, 0.04], [0.5, 0.3, 0.15, 0.05]],
    [[0.3, 0.6, 0.06, 0.04], [0.7, 0.05, 0.2, 0.05], [0.1, 0.05, 0.15, 0.7]],
    [0, 0, 0],
)


def test_events_are_those_of_the_configured_metric_and_none_without_a_gate() -> None:
    def of(metric: Any, threshold: float = 0.7) -> list[bool]:
        gate = GateConfig(metric, k=2, threshold=threshold, top_p=0.5)
        found = judge(VIEWS, gate)
        assert found.overlap.tolist() == [1.0, 0.5, 0.0]
        return found.event.tolist()

    assert of("overlap") == [False, True, True]
    assert of("teacher_top_p") == [True, False, True]  # the first id has the nucleus to itself
    # min(p, q) of the student's best two: .3 + .3, .6 + .05, .1 + .05
    assert of("acceptance", 0.62) == [True, False, True] and of("acceptance", 0.2) == [False, False, True]
    assert of("shared_mass", 0.62) == [False, True, True] and of("shared_mass", 0.5) == [False, False, True]
    without = judge(VIEWS, None)
    assert not without.event.any() and without.event.dtype == torch.bool
    assert without.overlap.tolist() == [1.0, 0.5, 0.0]


def test_the_masses_are_those_of_the_students_best_ids() -> None:
    found = judge(VIEWS, None)
    assert found.student_mass.tolist() == pytest.approx([0.9, 0.9, 0.8])
    assert found.teacher_mass.tolist() == pytest.approx([0.9, 0.75, 0.15])
    assert found.acceptance.tolist() == pytest.approx([0.6, 0.65, 0.15])


def test_acceptance_is_blind_to_the_order_of_a_tail_without_mass_and_the_overlap_is_not() -> None:
    """Two sure models: the same first token, and what comes second is noise."""
    sure = views([[0.98, 0.015, 0.005]], [[0.98, 0.005, 0.015]], [0])
    assert judge(sure, GateConfig(k=2)).event.tolist() == [True]
    assert judge(sure, GateConfig("acceptance", k=2)).event.tolist() == [False]


# ---------------------------------------------------------------------------------------------------- weights


def test_a_clean_response_has_reliability_one_and_weight_one_and_a_half() -> None:
    gate = apply_gate(torch.zeros(2, 5, dtype=torch.bool), torch.ones(2, 5, dtype=torch.bool), GateConfig())
    assert (gate.reliability_BT == 1).all()
    assert (gate.weight_BT == 1.5).all()
    assert gate.reliable_length_B.tolist() == [5, 5]


def test_an_event_down_weights_its_own_token() -> None:
    event = torch.tensor([[False, True, False, True]])
    gate = apply_gate(event, torch.ones_like(event), GateConfig(w_drop=0.25))
    assert gate.reliability_BT.tolist() == [[1.0, 0.75, 0.75, 0.5]]
    assert gate.weight_BT.tolist() == [[1.5, 1.25, 1.25, 1.0]]


def test_reliability_is_exactly_zero_from_the_hundredth_event_on() -> None:
    event = torch.ones(1, 150, dtype=torch.bool)
    for dtype in (torch.float32, torch.float64):
        gate = apply_gate(event, event, GateConfig(), dtype)
        assert (gate.reliability_BT[0, 99:] == 0).all()
        assert gate.reliability_BT[0, 98].item() == pytest.approx(0.01)
        assert (gate.weight_BT[0, 99:] == 0.5).all()
        assert gate.reliable_length_B.tolist() == [99]


@given(st.integers(1, 3000))
@quick
def test_one_over_n_per_event_leaves_nothing_at_the_nth(n: int) -> None:
    event = torch.ones(1, n + 1, dtype=torch.bool)
    gate = apply_gate(event, event, GateConfig(w_drop=1 / n, w_base=0.0), torch.float64)
    assert gate.reliability_BT[0, n - 1].item() == 0
    assert gate.reliable_length_B.item() == n - 1


def test_base_normalisation_trains_a_clean_prefix_at_weight_one() -> None:
    event = torch.tensor([[False, False, True]])
    gate = apply_gate(event, torch.ones_like(event), GateConfig(w_drop=0.5, weight_normalisation="base"))
    assert gate.weight_BT[0].tolist() == pytest.approx([1, 1, 1 / 1.5])


def test_mean_normalisation_gives_every_response_a_mean_weight_of_one() -> None:
    event = torch.tensor([[False, True, True, False], [False, False, False, False]])
    valid = torch.tensor([[True, True, True, False], [True, True, True, True]])
    gate = apply_gate(event, valid, GateConfig(w_drop=0.5, weight_normalisation="mean"))
    assert (gate.weight_BT.sum(1) / valid.sum(1)).tolist() == pytest.approx([1, 1])
    assert gate.weight_BT[0].tolist() == pytest.approx([1.5, 1, 0.5, 0])


@pytest.mark.parametrize("normalisation", ["none", "base", "mean"])
def test_a_response_with_no_weight_left_stays_at_zero(normalisation: str) -> None:
    config = GateConfig(w_drop=1.0, w_base=0.0, weight_normalisation=normalisation)
    event = torch.ones(2, 3, dtype=torch.bool)
    gate = apply_gate(event, torch.tensor([[True] * 3, [False] * 3]), config)
    assert (gate.weight_BT == 0).all()
    assert gate.reliable_length_B.tolist() == [0, 0]


@given(rows(), gates)
@quick
def test_weight_never_rises_and_never_recovers_after_an_event(data: tuple[Tensor, Tensor], config: GateConfig) -> None:
    event_BT, length_B = data
    gate = apply_gate(event_BT, valid_of(event_BT, length_B), config, torch.float64)
    for event, weight, reliability, length in zip(
        event_BT, gate.weight_BT, gate.reliability_BT, length_B.tolist(), strict=True
    ):
        for values in (weight[:length], reliability[:length]):
            assert (values.diff() <= 0).all()
            assert (values >= 0).all()
        assert (reliability <= 1).all()
        if config.w_drop > 0:
            # An event always costs something, until there is nothing left to lose.
            fell = reliability[:length].diff(prepend=torch.ones(1, dtype=torch.float64)) < 0
            spent = reliability[:length] == 0
            assert ((fell == event[:length]) | spent).all()
        assert (weight[length:] == 0).all()


@given(rows(), gates, st.integers(0, 9), st.booleans())
@quick
def test_padding_changes_nothing(
    data: tuple[Tensor, Tensor], config: GateConfig, extra: int, padding_events: bool
) -> None:
    event_BT, length_B = data
    valid_BT = valid_of(event_BT, length_B)
    gate = apply_gate(event_BT, valid_BT, config)
    padding, outside = torch.full((len(event_BT), extra), padding_events), torch.zeros(len(event_BT), extra).bool()
    right = apply_gate(torch.cat([event_BT, padding], 1), torch.cat([valid_BT, outside], 1), config)
    left = apply_gate(torch.cat([padding, event_BT], 1), torch.cat([outside, valid_BT], 1), config)
    for padded, start in ((right, 0), (left, extra)):
        assert torch.equal(padded.weight_BT[:, start : start + event_BT.shape[1]], gate.weight_BT)
        assert torch.equal(padded.weight_BT.bool().sum(1), gate.weight_BT.bool().sum(1))
        assert torch.equal(padded.reliable_length_B, gate.reliable_length_B)


@given(rows(), gates, st.randoms(use_true_random=False))
@quick
def test_batch_order_changes_nothing(data: tuple[Tensor, Tensor], config: GateConfig, random: Random) -> None:
    event_BT, length_B = data
    order = list(range(len(length_B)))
    random.shuffle(order)
    gate = apply_gate(event_BT, valid_of(event_BT, length_B), config)
    other = apply_gate(event_BT[order], valid_of(event_BT, length_B)[order], config)
    for one, two in zip(gate, other, strict=True):
        assert torch.equal(one[order], two)


# ---------------------------------------------------------------------------------------------------- packed


@given(rows(), gates, st.integers(1, 50))
@quick
def test_the_packed_gate_equals_the_padded_one_at_every_chunk_size(
    data: tuple[Tensor, Tensor], config: GateConfig, chunk: int
) -> None:
    event_BT, length_B = data
    valid_BT = valid_of(event_BT, length_B)
    padded = apply_gate(event_BT, valid_BT, config)
    offsets = [0, *length_B.cumsum(0).tolist()]
    event_N = event_BT[valid_BT]

    whole = apply_gate_packed(event_N, offsets, config)
    assert torch.equal(whole.reliability_BT, padded.reliability_BT[valid_BT])
    assert torch.allclose(whole.weight_BT, padded.weight_BT[valid_BT], rtol=1e-6, atol=0)
    assert torch.equal(whole.reliable_length_B, padded.reliable_length_B)

    packed = PackedGate(offsets, config)
    pieces = [packed.advance(piece) for piece in event_N.split(chunk)] if len(event_N) else []
    reliability_N = torch.cat([torch.empty(0), *[reliability for reliability, _ in pieces]])
    weight_N = torch.cat([torch.empty(0), *[weight for _, weight in pieces]])
    assert torch.equal(reliability_N, padded.reliability_BT[valid_BT])
    assert torch.equal(packed.reliable_length(reliability_N), padded.reliable_length_B)
    if config.weight_normalisation != "mean":
        assert torch.equal(weight_N, padded.weight_BT[valid_BT])


def test_without_a_gate_every_packed_token_is_reliable_at_weight_one() -> None:
    packed = PackedGate([0, 2, 2, 5], None)
    reliability_N, weight_N = packed.advance(torch.ones(5, dtype=torch.bool))
    assert reliability_N.tolist() == weight_N.tolist() == [1.0] * 5
    assert packed.reliable_length(reliability_N).tolist() == [2, 0, 3]


def test_more_events_than_tokens_are_refused() -> None:
    packed = PackedGate([0, 3], GateConfig())
    packed.advance(torch.zeros(2, dtype=torch.bool))
    with pytest.raises(ValueError, match="cu_seqlens ends at 3"):
        packed.advance(torch.zeros(2, dtype=torch.bool))


# ---------------------------------------------------------------------------------------------------- bad input


def test_shapes_that_do_not_fit_are_named() -> None:
    with pytest.raises(ValueError, match=r"student_ids \[2, 4\] and teacher_ids \[2, 3\]"):
        overlap_ratio(torch.zeros(2, 4), torch.zeros(2, 3))
    with pytest.raises(ValueError, match="k ≥ 1"):
        overlap_ratio(torch.zeros(2, 0), torch.zeros(2, 0))
    with pytest.raises(ValueError, match=r"sampled_ids \[3\]"):
        top_p_reject(torch.zeros(3), torch.zeros(2, 4), torch.zeros(2, 4), 0.9)
    with pytest.raises(ValueError, match=r"event \[2, 3\] and valid \[2, 4\]"):
        apply_gate(torch.zeros(2, 3), torch.zeros(2, 4), GateConfig())
