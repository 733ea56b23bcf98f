"""What does not fit the fused loss is one error that names it."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch

from prune_opd.config import GateConfig, ObjectiveConfig, WeightingConfig
from prune_opd.errors import ConfigError
from tests.reference import VOCAB, Case, make_case


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
    ("settings", "message"),
    [
        ({"objective": ObjectiveConfig(k=62)}, r"objective.k = 62 is larger than vocab_size = 61"),
        ({"gate": GateConfig(k=62)}, r"gate.k = 62 is larger than vocab_size = 61"),
        (
            {"weighting": WeightingConfig("entropy_aware", forward_k=62)},
            r"weighting.forward_k = 62 is larger than vocab_size = 61",
        ),
        ({"chunk": 0}, r"chunk = 0"),
        ({"policy": "kept"}, r"policy = 'kept' is unknown: give None, 'keep', or"),
    ],
)
def test_a_setting_that_does_not_fit_is_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_case().fused(**settings)


@pytest.mark.parametrize(
    ("vocab_size", "message"),
    [(65, r"vocab_size = 65 does not fit student_weight: 64 rows × 1"), (0, r"vocab_size = 0")],
)
def test_a_vocabulary_that_does_not_fit_is_named(vocab_size: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        broken("vocab_size", vocab_size).fused()


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("model", ["student", "teacher"])
def test_hidden_states_that_are_not_finite_are_named(model: str, value: float) -> None:
    case = make_case()
    getattr(case, f"{model}_hidden")[20, 3] = value
    with pytest.raises(ValueError, match=f"{model}_hidden gives logits that are not finite"):
        case.fused(chunk=7)
