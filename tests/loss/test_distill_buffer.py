"""The fused loss with a gradient buffer of the output weight (`weight_grad`) against the same loss without one."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from prune_opd.config import ObjectiveConfig
from prune_opd.loss import products
from tests.reference import OBJECTIVE, OBJECTIVES, VOCAB, Case, describe, make_case


def without(case: Case, objective: ObjectiveConfig = OBJECTIVE) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, hidden gradient and weight gradient through autograd alone."""
    leaves = case.leaves(case.student_weight.dtype)
    loss = leaves.fused(objective=objective, chunk=7)[0]
    loss.backward()
    return loss.detach(), *leaves.gradients()


def hidden_gradient(case: Case) -> Tensor:
    gradient = case.student_hidden.grad
    assert gradient is not None
    return gradient


def assert_close(got: Tensor, expected: Tensor, tolerance: float) -> None:
    assert ((got.double() - expected.double()).abs() <= tolerance * expected.abs().max().double()).all()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 2e-5)])
@pytest.mark.parametrize("objective", OBJECTIVES, ids=describe)
def test_value_and_gradients_equal_those_without_a_buffer(
    objective: ObjectiveConfig, dtype: torch.dtype, tolerance: float
) -> None:
    case = make_case().leaves(dtype)
    loss, hidden, weight = without(case, objective)
    buffer = torch.zeros_like(weight)
    ours = case.fused(objective=objective, chunk=7, weight_grad=buffer)[0]
    assert_close(buffer, weight, tolerance)  # before the backward: it is formed with the loss
    ours.backward()
    assert ours.item() == loss.item()
    assert torch.equal(hidden_gradient(case), hidden)
    assert_close(buffer, weight, tolerance)
    assert case.student_weight.grad is None


@pytest.mark.parametrize("rows", [8192, 10])  # cast up at a time: all, and some that do not divide the 64
def test_a_bf16_weight_adds_to_an_fp32_buffer_what_it_would_have_returned(
    rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "BLOCK", 8 * rows)
    case = make_case().leaves(torch.bfloat16)
    _, hidden, weight = without(case)
    buffer = torch.zeros(weight.shape)
    case.fused(chunk=7, weight_grad=buffer)[0].backward()
    assert torch.equal(buffer.bfloat16(), weight) and torch.equal(hidden_gradient(case), hidden)
    assert not torch.equal(buffer, weight.float())  # it has kept the digits that a bf16 gradient drops


def test_micro_batches_add_up_in_the_buffer() -> None:
    first, second = make_case(seed=1).leaves(torch.float64), make_case((5, 3), seed=2).leaves(torch.float64)
    second = dataclasses.replace(second, student_weight=first.student_weight, teacher_weight=first.teacher_weight)
    expected = without(first)[2] + without(second)[2]
    buffer = torch.ones_like(expected)
    for case in (first, second):
        case.fused(chunk=7, weight_grad=buffer)[0].backward()
    assert_close(buffer - 1, expected, 1e-9)


def test_a_tied_weight_keeps_its_other_gradient_beside_the_buffer() -> None:
    case = make_case()
    grads: list[Tensor] = []
    for buffered in (False, True):
        leaves = case.leaves(torch.float64)
        embedded = leaves.student_weight[leaves.sampled] * 0.3 + leaves.student_hidden.detach()
        tied = dataclasses.replace(leaves, student_hidden=embedded.tanh())
        buffer = torch.zeros_like(leaves.student_weight, requires_grad=False)
        tied.fused(chunk=7, weight_grad=buffer if buffered else None)[0].backward()
        embedding = leaves.student_weight.grad
        assert embedding is not None and embedding.any() and buffer.any() == buffered
        grads.append(embedding + buffer)
    assert_close(grads[1], grads[0], 1e-9)


def test_a_loss_of_the_weight_alone_still_comes_through_its_backward() -> None:
    case = make_case().leaves(torch.float64)
    case.student_hidden.requires_grad_(False)
    buffer = torch.zeros_like(case.student_weight, requires_grad=False)
    loss = case.fused(weight_grad=buffer)[0]
    with pytest.raises(ValueError, match="reaches loss_sum is 2,"):
        (2 * loss).backward()
    case.fused(weight_grad=buffer.zero_())[0].backward()
    assert_close(buffer, without(make_case())[2], 1e-9)


def test_nothing_is_added_without_gradients() -> None:
    case = make_case().leaves(torch.float64)
    buffer = torch.zeros_like(case.student_weight, requires_grad=False)
    with torch.no_grad():
        loss = case.fused(weight_grad=buffer)[0]
    assert loss.item() == case.fused()[0].item()
    assert not buffer.any()


# ---------------------------------------------------------------------------------------------------- misuse


@pytest.mark.parametrize("scale", [0.5, 0.0, -1.0])
def test_another_upstream_gradient_than_one_is_refused(scale: float) -> None:
    case = make_case().leaves(torch.float64)
    loss = case.fused(weight_grad=torch.zeros(case.student_weight.shape))[0]
    with pytest.raises(ValueError, match=f"the gradient that reaches loss_sum is {scale:g}, but weight_grad already"):
        (scale * loss).backward()
    assert case.student_hidden.grad is None


def test_a_second_backward_is_refused() -> None:
    case = make_case().leaves(torch.float64)
    loss = case.fused(weight_grad=torch.zeros(case.student_weight.shape))[0]
    loss.backward(retain_graph=True)
    first = hidden_gradient(case).clone()
    with pytest.raises(RuntimeError, match="a second backward through a loss with weight_grad"):
        loss.backward()
    assert torch.equal(hidden_gradient(case), first)


@pytest.mark.parametrize(
    ("buffer", "message"),
    [
        (torch.zeros(VOCAB, 8), r"weight_grad is torch.float32 \[61, 8\] on cpu and student_weight is torch.float64 "),
        (torch.zeros(8, VOCAB + 3), r"weight_grad is torch.float32 \[8, 64\]"),
        (torch.zeros(VOCAB + 3, 8).bfloat16(), r"weight_grad is torch.bfloat16 \[64, 8\]"),
        (torch.zeros(VOCAB + 3, 8).long(), r"weight_grad is torch.int64 \[64, 8\]"),
        (torch.zeros(VOCAB + 3, 8, device="meta"), r"weight_grad is torch.float32 \[64, 8\] on meta"),
        (torch.zeros(VOCAB + 3, 8, requires_grad=True), r"weight_grad is .* requires_grad and student_weight"),
    ],
)
def test_a_buffer_that_does_not_fit_is_described(buffer: Tensor, message: str) -> None:
    case = make_case().leaves(torch.float64)
    with pytest.raises(ValueError, match=message):
        case.fused(weight_grad=buffer)
    assert buffer.is_meta or not buffer.any()


def test_a_buffer_of_a_weight_that_wants_no_gradient_is_refused() -> None:
    case: Any = make_case().leaves(torch.float64)
    case.student_weight.requires_grad_(False)
    with pytest.raises(ValueError, match="beside a weight that requires a gradient"):
        case.fused(weight_grad=torch.zeros(case.student_weight.shape))
