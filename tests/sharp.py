"""A pair for bf16: sharp models that have nearly converged, for which rounded logits hold little of what is left.

A pair of random models hides it: their logits differ by more than a rounding.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import torch
from torch import Tensor

from prune_opd.config import ObjectiveConfig, WeightingConfig
from tests.reference import GATE, OBJECTIVES, WEIGHTINGS, Case, describe

# Every objective by itself, and with every weighting.
SHARP_CASES = {
    f"{describe(objective)}, {weighting.name}": (objective, weighting)
    for objective in OBJECTIVES
    for weighting in (WeightingConfig(), *WEIGHTINGS)
}
SHARP_CASES["ends as a class"] = (ObjectiveConfig(k=6, ends="class"), WeightingConfig())
ENDS = (3, 500, 700)  # on both of two ranks; every eighth token sampled is one of them
SHARP_TOLERANCE = 0.01  # of a gradient in bf16, relative, against float64 of the same bf16 inputs


class Gradients(NamedTuple):
    hidden_NH: Tensor
    weight_VH: Tensor

    def error(self, expected: Gradients) -> tuple[float, float]:
        """|difference| / |expected| of both, as vectors."""
        hidden, weight = (
            ((got.double() - right).norm() / right.norm()).item() for got, right in zip(self, expected, strict=True)
        )
        return hidden, weight


def sharp_case(tokens: int = 40, hidden: int = 64, vocab: int = 1024, scale: float = 8, noise: float = 0.01) -> Case:
    """In bf16; what is sampled is sampled from the student. scale: deviation of its logits [nats]. noise: relative."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    hidden_NH, weight_VH = normal(tokens, hidden), normal(vocab, hidden) * scale / hidden**0.5
    teacher_NH = hidden_NH + noise * normal(tokens, hidden)
    teacher_VH = weight_VH + noise * normal(vocab, hidden) * scale / hidden**0.5
    hidden_NH, weight_VH, teacher_NH, teacher_VH = (
        part.bfloat16() for part in (hidden_NH, weight_VH, teacher_NH, teacher_VH)
    )
    probability_NV = (hidden_NH.double() @ weight_VH.double().T).softmax(-1)
    sampled_N = probability_NV.multinomial(1, generator=generator)[:, 0]
    offsets = [0, tokens // 3, tokens // 3, tokens]
    return Case(hidden_NH, weight_VH, teacher_NH, teacher_VH, sampled_N, offsets, vocab)


def gradients(
    case: Case,
    objective: ObjectiveConfig,
    weighting: WeightingConfig,
    dtype: torch.dtype = torch.bfloat16,
    buffer_dtype: torch.dtype | None = None,
    **more: Any,
) -> Gradients:
    """Both of the fused loss, the weight's in a buffer that keeps its digits if it is not told otherwise."""
    if objective.ends == "class":
        sampled = case.sampled.clone()
        sampled[::8] = torch.tensor(ENDS * len(sampled))[: len(sampled[::8])]
        case = dataclasses.replace(case, sampled=sampled, terminal_ids=ENDS)
    leaves = case.leaves(dtype)
    buffer = torch.zeros(leaves.student_weight.shape, dtype=buffer_dtype or torch.promote_types(dtype, torch.float32))
    leaves.fused(GATE, objective, weighting, chunk=16, weight_grad=buffer, **more)[0].backward()
    hidden_NH = leaves.student_hidden.grad
    assert hidden_NH is not None
    return Gradients(hidden_NH, buffer)
