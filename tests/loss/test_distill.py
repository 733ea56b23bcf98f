"""The fused loss on one rank against the plain float64 reference: chunks, dtypes, ties, what it leaves in a graph.

Beside it: test_distill_gate, _objectives, _inputs (what does not fit) and _buffer; tests/distributed has more ranks.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from prune_opd.config import ObjectiveConfig
from prune_opd.loss import vocab_parallel
from prune_opd.loss.vocab_parallel import VocabShard
from tests.loss.checks import assert_agrees
from tests.reference import (
    GATE,
    OBJECTIVE,
    VOCAB,
    make_case,
    top_ids,
)

# ---------------------------------------------------------------------------------------------------- the right numbers


@pytest.mark.parametrize("chunk", [1, 2, 5, 8, 24, 1024])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 2e-5)])
def test_value_and_gradients_equal_the_reference_at_every_chunk_size(
    chunk: int, dtype: torch.dtype, tolerance: float
) -> None:
    stats = assert_agrees(make_case(), GATE, OBJECTIVE, dtype, tolerance, chunk=chunk)
    assert 0 < stats.event_N.sum() < len(stats.event_N)  # or the gate would not have been tested


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


@pytest.mark.parametrize("k", [1, 16])
def test_top_k_by_blocks_breaks_ties_toward_the_lower_id(k: int) -> None:
    """Wide enough for blocks, and enough rows to go through in parts; ties within a block and across all of them."""
    generator = torch.Generator().manual_seed(0)
    columns = 4 * k * vocab_parallel.BLOCK
    rows = [torch.zeros(columns), torch.randint(3, (columns,), generator=generator).float()]
    rows += [torch.randn(columns, generator=generator), torch.randn(columns, generator=generator).bfloat16().float()]
    rows += [torch.arange(columns).remainder(vocab_parallel.BLOCK).float(), -torch.arange(columns).float()]
    logits = torch.stack(rows).repeat(-(-vocab_parallel.CACHED // columns), 1)
    top = vocab_parallel.local_topk(logits, k)
    by_value = logits.sort(dim=1, descending=True, stable=True)
    assert torch.equal(top.ids_NK, by_value.indices[:, :k])
    assert torch.equal(top.values_NK, by_value.values[:, :k])


def test_a_loss_with_ties_everywhere_equals_the_reference() -> None:
    case = make_case()
    case.student_weight, case.teacher_weight = case.student_weight.sign(), case.teacher_weight.sign()
    case.student_hidden, case.teacher_hidden = case.student_hidden.sign(), case.teacher_hidden.sign()
    case.student_hidden[3] = 0  # constant logits: a tie over the whole vocabulary
    assert_agrees(case, GATE, OBJECTIVE, chunk=7)


# ---------------------------------------------------------------------------------------------------- its parts


def test_normaliser_and_local_gather_equal_log_softmax() -> None:
    logits, ids = torch.randn(4, 10) * 20, torch.tensor([[0, 9], [3, 3], [5, 1], [8, 2]])
    shard = VocabShard(rows=10, vocab_size=8)
    vocab_parallel.mask_padding_(logits, shard)
    assert torch.allclose(vocab_parallel.log_normaliser(logits, shard), logits[:, :8].logsumexp(1))
    assert torch.equal(vocab_parallel.local_gather(logits, ids, shard), logits.gather(1, ids))
    assert (logits[:, 8:] == vocab_parallel.NOTHING).all()


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
