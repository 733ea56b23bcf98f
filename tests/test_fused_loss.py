"""The fused loss on one rank against the plain float64 reference; tests/distributed has it on two."""

from __future__ import annotations

import dataclasses
import math
import weakref
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from prune_opd import vocab_parallel
from prune_opd.config import GateConfig, ObjectiveConfig, WeightingConfig
from prune_opd.errors import ConfigError
from prune_opd.fused_loss import GateStats
from prune_opd.gate import overlap_ratio
from prune_opd.objective import token_loss
from prune_opd.vocab_parallel import VocabShard
from tests.reference import (
    GATE,
    NO_WEIGHTING,
    OBJECTIVE,
    OBJECTIVES,
    VOCAB,
    WEIGHTINGS,
    Case,
    describe,
    make_case,
    top_ids,
)


def assert_agrees(
    case: Case,
    gate: GateConfig | None,
    objective: ObjectiveConfig,
    dtype: torch.dtype = torch.float64,
    tolerance: float = 1e-9,
    weighting: WeightingConfig = NO_WEIGHTING,
    **more: Any,
) -> GateStats:
    """Value, both gradients and every statistic; tolerances are relative to the largest entry of the reference."""
    ours, plain = case.leaves(dtype), case.leaves(dtype).leaves(torch.float64)
    loss, count, stats = ours.fused(gate, objective, weighting=weighting, **more)
    reference = plain.reference(gate, objective, weighting)
    (3 * loss).backward()  # the caller scales the sum
    (3 * reference.loss_sum).backward()

    def close(got: Tensor, expected: Tensor | list[float]) -> None:
        expected = torch.as_tensor(expected, dtype=torch.float64)
        assert got.shape == expected.shape
        scale = max(expected.abs().max().item(), 1e-3) if expected.numel() else 1.0
        assert ((got.double() - expected).abs() <= tolerance * scale).all(), (got.double() - expected).abs().max()

    assert count == len(case.sampled)
    assert loss.dtype == dtype and loss.shape == ()
    close(loss, reference.loss_sum.detach())
    for got, expected in zip(ours.gradients(), plain.gradients(), strict=True):
        assert got.dtype == dtype
        close(got, expected)
    assert stats.overlap_N.dtype == torch.float32
    assert stats.overlap_N.tolist() == pytest.approx(reference.overlap)
    assert stats.event_N.tolist() == reference.event
    assert stats.reliable_length_B.tolist() == reference.reliable_length
    assert stats.length_B.tolist() == reference.length
    close(stats.reliability_N, reference.reliability)
    close(stats.weight_N, reference.weight)
    close(stats.sampled_logp_N, reference.sampled_logp)
    close(stats.divergence_N, reference.divergence)
    return stats


# ---------------------------------------------------------------------------------------------------- the right numbers


@pytest.mark.parametrize("chunk", [1, 2, 5, 8, 24, 1024])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 2e-5)])
def test_value_and_gradients_equal_the_reference_at_every_chunk_size(
    chunk: int, dtype: torch.dtype, tolerance: float
) -> None:
    stats = assert_agrees(make_case(), GATE, OBJECTIVE, dtype, tolerance, chunk=chunk)
    assert 0 < stats.event_N.sum() < len(stats.event_N)  # or the gate would not have been tested


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
    ],
    ids=lambda gate: (
        "no gate" if gate is None else f"{gate.metric}-{gate.weight_normalisation}-k{gate.k}-b{gate.w_base:g}"
    ),
)
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_every_gate_setting_equals_the_reference(gate: GateConfig | None, temperature: float) -> None:
    assert_agrees(make_case(), gate, ObjectiveConfig(k=6, temperature=temperature), chunk=7)


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


def test_chunks_and_packing_change_nothing() -> None:
    """Packing is causal: each response alone gives what it gives beside the others."""
    case = make_case()
    gate = dataclasses.replace(GATE, weight_normalisation="mean")
    together = case.leaves(torch.float64)
    loss, _, stats = together.fused(gate, chunk=5)
    loss.backward()
    total, apart = 0.0, case.leaves(torch.float64)
    for begin, end in pairwise(case.offsets):
        rows = slice(begin, end)
        alone = dataclasses.replace(
            apart,
            student_hidden=apart.student_hidden[rows],
            teacher_hidden=apart.teacher_hidden[rows],
            sampled=apart.sampled[rows],
            offsets=[0, end - begin],
        )
        part, _, part_stats = alone.fused(gate)
        part.backward()
        total += part.item()
        assert torch.equal(part_stats.weight_N, stats.weight_N[rows])
    assert loss.item() == pytest.approx(total, rel=1e-12)
    for one, other in zip(together.gradients(), apart.gradients(), strict=True):
        assert torch.allclose(one, other, rtol=1e-10, atol=1e-12)


def test_a_tied_weight_gets_the_gradient_of_both_its_uses() -> None:
    case = make_case()
    grads: list[Tensor] = []
    for fused in (True, False):
        leaves = case.leaves(torch.float64)
        embedded = leaves.student_weight[leaves.sampled] * 0.3 + leaves.student_hidden.detach()
        tied = dataclasses.replace(leaves, student_hidden=embedded.tanh())
        loss = tied.fused(chunk=7)[0] if fused else tied.reference().loss_sum
        grads += torch.autograd.grad(loss, leaves.student_weight)
    assert torch.allclose(grads[0], grads[1], rtol=1e-9, atol=1e-11)


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
    pulled = objective.name == "topk_forward_kl" or weighting.name == "entropy_aware"
    assert any(gradient.any() for gradient in case.gradients()) == pulled
    assert (loss.item() != 0) == pulled
    if objective.name != "topk_forward_kl":
        assert not stats.divergence_N.any()


def test_a_forward_kl_on_every_word_is_that_of_the_vocabulary_and_leaves_a_twin_alone() -> None:
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
        assert (stats.weight_N[10:24] == 0).sum() == 14 - math.ceil(0.4 * 14)


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


def test_padded_vocabulary_rows_have_no_part_in_anything() -> None:
    case = make_case()
    case.student_weight[VOCAB:] = 100.0  # would win every top-k
    case.teacher_weight[VOCAB:] = -100.0
    leaves = case.leaves(torch.float64)
    leaves.fused(chunk=5)[0].backward()
    assert not leaves.gradients()[1][VOCAB:].any()
    assert_agrees(case, GATE, OBJECTIVE, chunk=5)
    assert_agrees(case, GATE, ObjectiveConfig("full_vocab_jsd", k=6), chunk=5)


def test_bf16_inputs_give_fp32_statistics_near_the_reference() -> None:
    case = make_case().leaves(torch.bfloat16)
    loss, _, stats = case.fused(None, chunk=7)
    loss.backward()
    plain = case.leaves(torch.float64)
    reference = plain.reference(None)
    reference.loss_sum.backward()
    assert loss.dtype == stats.sampled_logp_N.dtype == stats.weight_N.dtype == torch.float32
    assert loss.item() == pytest.approx(reference.loss_sum.item(), rel=0.02)
    for got, expected in zip(case.gradients(), plain.gradients(), strict=True):
        assert got.dtype == torch.bfloat16
        assert torch.nn.functional.cosine_similarity(got.double().flatten(), expected.flatten(), dim=0) > 0.999


def test_large_logits_keep_small_log_probabilities_exact() -> None:
    case = make_case()
    case.student_hidden, case.teacher_hidden = case.student_hidden * 30, case.teacher_hidden * 30
    assert_agrees(case, None, OBJECTIVE, chunk=7)
    assert_agrees(case, None, OBJECTIVE, torch.float32, 1e-4, chunk=7)


# ---------------------------------------------------------------------------------------------------- ties


def tied_logits() -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(0)
    yield torch.zeros(3, 200)
    yield torch.randint(3, (5, 200), generator=generator).float()
    yield torch.randint(40, (5, 200), generator=generator).float()
    yield torch.randn(5, 200, generator=generator)
    yield torch.cat([torch.full((2, 150), -torch.inf), torch.randint(3, (2, 50), generator=generator).float()], 1)


@pytest.mark.parametrize("k", [1, 2, 16, 50])
def test_top_k_breaks_ties_toward_the_lower_id(k: int) -> None:
    for logits in tied_logits():
        top = vocab_parallel.topk(logits, k, VocabShard(rows=200, vocab_size=200))
        for row, ids, values in zip(logits, top.ids_NK, top.values_NK, strict=True):
            assert ids.tolist() == top_ids(row, k)
            assert torch.equal(values, row[ids])


def test_a_loss_with_ties_everywhere_equals_the_reference() -> None:
    case = make_case()
    case.student_weight, case.teacher_weight = case.student_weight.sign(), case.teacher_weight.sign()
    case.student_hidden, case.teacher_hidden = case.student_hidden.sign(), case.teacher_hidden.sign()
    case.student_hidden[3] = 0  # constant logits: a tie over the whole vocabulary
    assert_agrees(case, GATE, OBJECTIVE, chunk=7)


# ---------------------------------------------------------------------------------------------------- its parts


def test_the_objective_is_the_policy_gradient_of_method_md() -> None:
    """Worked by hand: p = (.6, .2), so w = (.75, .25); log p − log q = (log 2, 0); W = 2."""
    student_logp, teacher_logp = torch.tensor([[0.6, 0.2]]).log(), torch.tensor([[0.3, 0.2]]).log()
    loss, grad, divergence, reward = token_loss(OBJECTIVE, student_logp, teacher_logp, torch.tensor([2.0]))
    assert reward[0].tolist() == pytest.approx([-1.5 * math.log(2), 0])
    assert loss.tolist() == pytest.approx([1.5 * math.log(2) * math.log(0.6)])
    assert torch.equal(grad, -reward)
    assert divergence.tolist() == pytest.approx([0.75 * math.log(2)])


def test_normaliser_and_gather_equal_log_softmax() -> None:
    logits, ids = torch.randn(4, 10) * 20, torch.tensor([[0, 9], [3, 3], [5, 1], [8, 2]])
    shard = VocabShard(rows=10, vocab_size=8)
    vocab_parallel.mask_padding_(logits, shard)
    assert torch.allclose(vocab_parallel.log_normaliser(logits, shard), logits[:, :8].logsumexp(1))
    assert torch.equal(vocab_parallel.gather(logits, ids, shard), logits.gather(1, ids))
    assert (logits[:, 8:] == -torch.inf).all()


# ---------------------------------------------------------------------------------------------------- in a graph


def test_no_tokens_give_zero_loss_and_zero_gradient() -> None:
    for offsets in ([0], [0, 0, 0]):
        case = make_case(lengths=(0,)).leaves(torch.float32)
        case.offsets = offsets
        loss, count, stats = case.fused(dataclasses.replace(GATE, weight_normalisation="mean"))
        loss.backward()
        assert (loss.item(), count) == (0, 0)
        hidden, weight = case.gradients()
        assert hidden.shape == (0, 8) and not weight.any()
        assert stats.length_B.tolist() == stats.reliable_length_B.tolist() == [0] * (len(offsets) - 1)


def test_only_the_gradients_that_are_wanted_are_formed() -> None:
    expected = make_case().leaves(torch.float64)
    expected.fused()[0].backward()
    for wanted in ("student_hidden", "student_weight"):
        case = make_case().leaves(torch.float64)
        for name in ("student_hidden", "student_weight"):
            getattr(case, name).requires_grad_(name == wanted)
        case.fused()[0].backward()
        assert torch.equal(getattr(case, wanted).grad, getattr(expected, wanted).grad)
    with torch.no_grad():
        loss = expected.fused()[0]
    assert not loss.requires_grad
    assert not make_case().fused()[0].requires_grad
    assert loss.item() == expected.fused()[0].item()


def test_each_gradient_can_be_asked_for_separately() -> None:
    case = make_case().leaves(torch.float64)
    loss = case.fused()[0]
    (hidden,) = torch.autograd.grad(loss, case.student_hidden, retain_graph=True)
    weight, again = torch.autograd.grad(loss, (case.student_weight, case.student_hidden))
    reference = make_case().leaves(torch.float64)
    reference.fused()[0].backward()
    expected_hidden, expected_weight = reference.gradients()
    assert torch.equal(hidden, expected_hidden) and torch.equal(again, hidden)
    assert torch.equal(weight, expected_weight)


def test_statistics_and_teacher_are_outside_the_graph() -> None:
    case = make_case().leaves(torch.float64)
    case.teacher_hidden.requires_grad_()
    case.teacher_weight.requires_grad_()
    loss, _, stats = case.fused()
    loss.backward()
    assert case.teacher_hidden.grad is None and case.teacher_weight.grad is None
    measured = [getattr(stats, field.name) for field in dataclasses.fields(stats)]
    assert not any(tensor.requires_grad for tensor in measured if tensor is not None)


class Largest(TorchDispatchMode):
    """How many elements the matrices of at least so many columns have that are alive at the same time."""

    def __init__(self, columns: int) -> None:
        super().__init__()
        self.columns = columns
        self.alive = self.peak = 0
        self.seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, list | tuple) else [result]:
            if isinstance(tensor, Tensor) and tensor.ndim == 2 and tensor.shape[1] >= self.columns:
                storage = tensor.untyped_storage()
                if storage.data_ptr() not in self.seen:
                    self.seen.add(storage.data_ptr())
                    self.alive += tensor.numel()
                    self.peak = max(self.peak, self.alive)
                    weakref.finalize(tensor, self.forget, storage.data_ptr(), tensor.numel())
        return result

    def forget(self, pointer: int, elements: int) -> None:
        self.seen.discard(pointer)
        self.alive -= elements


@pytest.mark.parametrize(("name", "chunks"), [("topk_reverse_kl", 6), ("full_vocab_jsd", 16)])
def test_no_tensor_of_tokens_times_vocabulary_is_alive(name: str, chunks: int) -> None:
    case = make_case(lengths=(200, 100)).leaves(torch.float32)
    with Largest(columns=VOCAB) as largest:
        case.fused(objective=ObjectiveConfig(name, k=6), chunk=10)[0].backward()
    assert 10 * VOCAB < largest.peak < chunks * 10 * VOCAB  # a few chunks' worth; all tokens would be 300 * VOCAB


# ---------------------------------------------------------------------------------------------------- bad input


def broken(field: str, value: Any) -> Case:
    return dataclasses.replace(make_case(), **{field: value})


@pytest.mark.parametrize(
    ("case", "message"),
    [
        (
            broken("student_hidden", torch.zeros(24, 9).double()),
            r"student_hidden .*\[24, 9\] does not fit student_weight",
        ),
        (broken("teacher_weight", torch.zeros(70, 12)), "teacher_hidden torch.float64 .* dtype must agree"),
        (broken("student_hidden", torch.zeros(24, 8).long()), "student_hidden is torch.int64"),
        (broken("student_weight", torch.zeros(64).double()), r"student_weight is .* \[64\]: a floating-point matrix"),
        (broken("teacher_hidden", torch.zeros(23, 12).double()), "teacher_hidden has 23 tokens and student_hidden 24"),
        (broken("sampled", torch.zeros(23).long()), r"sampled_ids is torch.int64 \[23\]"),
        (broken("sampled", torch.zeros(24)), "sampled_ids is torch.float32"),
        (broken("sampled", torch.full((24,), VOCAB)), "sampled_ids has an id outside 0..60"),
        (broken("sampled", torch.full((24,), -1)), "sampled_ids has an id outside 0..60"),
        (broken("offsets", [0, 9, 23]), "cu_seqlens runs from 0 to 23"),
        (broken("offsets", [1, 9, 24]), "cu_seqlens runs from 1 to 24"),
        (broken("offsets", [0, 15, 9, 24]), r"cu_seqlens = \[0, 15, 9, 24\] decreases"),
        (broken("offsets", []), r"cu_seqlens = \[\]"),
        (broken("offsets", [[0, 24]]), r"cu_seqlens = \[\[0, 24\]\]"),
    ],
)
def test_a_tensor_that_does_not_fit_is_named(case: Case, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        case.fused()


@pytest.mark.parametrize(
    ("gate", "objective", "more", "message"),
    [
        (GATE, ObjectiveConfig(k=62), {}, r"objective.k = 62 is larger than vocab_size = 61"),
        (GateConfig(k=62), OBJECTIVE, {}, r"gate.k = 62 is larger than vocab_size = 61"),
        (GATE, OBJECTIVE, {"vocab_size": 65}, r"vocab_size = 65 does not fit student_weight: 64 rows × 1"),
        (GATE, OBJECTIVE, {"vocab_size": 0}, r"vocab_size = 0"),
        (GATE, OBJECTIVE, {"chunk": 0}, r"chunk = 0"),
        (
            GATE,
            OBJECTIVE,
            {"weighting": WeightingConfig("entropy_aware", forward_k=62)},
            r"weighting.forward_k = 62 is larger than vocab_size = 61",
        ),
    ],
)
def test_a_setting_that_does_not_fit_is_named(
    gate: GateConfig, objective: ObjectiveConfig, more: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        make_case().fused(gate, objective, **more)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("model", ["student", "teacher"])
def test_hidden_states_that_are_not_finite_are_named(model: str, value: float) -> None:
    case = make_case()
    getattr(case, f"{model}_hidden")[20, 3] = value
    with pytest.raises(ValueError, match=f"{model}_hidden gives logits that are not finite"):
        case.fused(chunk=7)


def test_overlap_without_a_gate_is_measured_with_the_objectives_k() -> None:
    case = make_case()
    stats = case.fused(None, ObjectiveConfig(k=4))[2]
    ids = [
        (h @ w[:VOCAB].T).topk(4).indices
        for h, w in ((case.student_hidden, case.student_weight), (case.teacher_hidden, case.teacher_weight))
    ]
    assert torch.equal(stats.overlap_N, overlap_ratio(*ids))
    assert not stats.event_N.any() and (stats.weight_N == 1).all() and (stats.reliability_N == 1).all()
