"""Layouts that do not fit are refused by name before a model is built; those that fit are not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from prune_opd.config import ParallelConfig, RolloutConfig, TrainConfig
from prune_opd.errors import ConfigError
from prune_opd.plan.layout import layout_problems
from tests.fake_models import train_config

DENSE = {"num_attention_heads": 8, "num_key_value_heads": 4, "num_hidden_layers": 12, "intermediate_size": 96}
EXPERTS = DENSE | {"num_experts": 8}


def problems(
    nproc: int, student: dict[str, Any] = DENSE, teacher: dict[str, Any] = DENSE, batch: int = 64, **parallel: Any
) -> list[str]:
    config: TrainConfig = train_config(
        Path("student"),
        Path("teacher"),
        parallel=ParallelConfig(**parallel),
        rollout=RolloutConfig(prompts=batch, responses=1),
    )
    return layout_problems(config, nproc, {"student": student, "teacher": teacher})


@pytest.mark.parametrize(
    ("nproc", "parallel"),
    [
        (4, {"tensor": 2, "pipeline": 2}),
        (4, {"pipeline": 4}),  # tensor: null leaves 1
        (8, {"tensor": 2, "pipeline": 2, "virtual_pipeline": 3, "sequence_parallel": True}),
        (8, {"tensor": 1, "distributed_optimizer": True, "recompute": "full"}),
        (8, {"tensor": 4, "teacher_tensor": 2, "teacher_pipeline": 4}),
    ],
)
def test_layouts_that_fit_pass(nproc: int, parallel: dict[str, Any]) -> None:
    assert problems(nproc, **parallel) == []


def test_experts_that_fit_pass() -> None:
    assert problems(8, EXPERTS, tensor=2, sequence_parallel=True, expert=4) == []
    assert problems(8, EXPERTS, EXPERTS, tensor=1, pipeline=2, expert=2, teacher_expert=4) == []


REFUSED: list[tuple[int, dict[str, Any], str]] = [
    (
        6,
        {"tensor": 2, "pipeline": 2},
        "parallel.tensor = 2 with parallel.pipeline = 2 puts a model on 4 ranks, which does not divide the 6 ranks:"
        " choose sizes with a product of 1, 2, 3, 6",
    ),
    (
        3,
        {"tensor": 1, "context": 2},
        "parallel.tensor = 1 with parallel.pipeline = 1 and parallel.context = 2 puts a model on 2 ranks",
    ),
    (
        8,
        {"tensor": 8},
        "parallel.tensor = 8 does not divide the 4 key-value heads of the student and the teacher:"
        " choose one of 1, 2, 4",
    ),
    (
        8,
        {"tensor": 1, "teacher_tensor": 8},
        "parallel.teacher_tensor = 8 does not divide the 4 key-value heads of the teacher: choose one of 1, 2, 4",
    ),
    (
        4,
        {"teacher_pipeline": 3},
        "parallel.tensor = 4 (null: all ranks) with parallel.teacher_pipeline = 3 puts a model",
    ),
    (
        5,
        {"tensor": 1, "pipeline": 5},
        "parallel.pipeline = 5 does not divide the 12 layers of the student and the teacher: choose one of 1, or",
    ),
    (
        4,
        {"tensor": 1, "pipeline": 4, "virtual_pipeline": 2},
        "parallel.virtual_pipeline = 2 does not divide the 3 layers of a stage of the student: choose one of 1, 3",
    ),
    (
        2,
        {"tensor": 1, "sequence_parallel": True},
        "parallel.sequence_parallel = True needs tensor parallelism, and parallel.tensor = 1",
    ),
    (2, {"tensor": 1, "expert": 2}, "parallel.expert = 2 needs experts, and the student has none: set parallel.expert"),
    (2, {"tensor": 1, "teacher_expert": 2}, "parallel.teacher_expert = 2 needs experts, and the teacher has none"),
    (
        16,
        {"tensor": 1, "pipeline": 4, "virtual_pipeline": 3, "batch": 12},
        "rollout.prompts * rollout.responses = 12 is fewer than the 4 data-parallel replicas with 4 micro-batches each",
    ),
    (
        16,
        {"tensor": 4, "pipeline": 4, "teacher_tensor": 1, "teacher_pipeline": 1, "batch": 8},
        "rollout.prompts * rollout.responses = 8 is fewer than the 16 replicas of the teacher: generate at least 16",
    ),
]


@pytest.mark.parametrize(("nproc", "settings", "beginning"), REFUSED, ids=[r[2].split(" = ")[0] for r in REFUSED])
def test_layouts_that_do_not_fit_are_refused(nproc: int, settings: dict[str, Any], beginning: str) -> None:
    assert problems(nproc, **settings)[0].startswith(beginning)


@pytest.mark.parametrize(
    ("settings", "beginning"),
    [
        (
            {"tensor": 1, "expert": 3},
            "parallel.expert = 3 does not divide the 8 experts of the student and the 4 ranks of a stage of the"
            " student: choose one of 1, 2, 4",
        ),
        (
            {"tensor": 1, "pipeline": 2, "expert": 4},
            "parallel.expert = 4 does not divide the 2 ranks of a stage of the student: choose one of 1, 2",
        ),
        (
            {"tensor": 4, "sequence_parallel": True, "expert": 2},
            "parallel.expert = 2 is no multiple of parallel.tensor = 4, so the ranks that hold all experts would not",
        ),
        (
            {"tensor": 2, "expert": 2},
            "parallel.tensor = 2 with experts needs sequence parallelism, or each rank routes all tokens:",
        ),
        (
            {"tensor": 2, "sequence_parallel": True},
            "parallel.expert = 1 with experts and parallel.tensor = 2: nobody adds up the gradients of experts that TP"
            " ranks share; set parallel.expert to a multiple of 2",
        ),
    ],
)
def test_experts_that_do_not_fit_are_refused(settings: dict[str, Any], beginning: str) -> None:
    assert problems(4, EXPERTS, **settings)[0].startswith(beginning)


@pytest.mark.parametrize(
    ("ranks", "beginning"),
    [
        (
            5,
            "rollout.tensor_parallel = 5 does not divide the 8 ranks and the 24 attention heads of the student and the"
            " 12 feed-forward columns of the student: choose one of 1, 2, 4, or another --nproc",
        ),
        (
            8,
            "rollout.tensor_parallel = 8 does not divide the 12 feed-forward columns of the student: choose one of 1, ",
        ),
        (
            3,
            "rollout.tensor_parallel = 3 neither divides the 4 key-value heads of the student nor is a multiple of"
            " them: choose one of 1, 2, 4",
        ),
    ],
)
def test_engines_that_vllm_would_not_build_are_refused(ranks: int, beginning: str) -> None:
    student = DENSE | {"intermediate_size": 12, "num_attention_heads": 24}  # 4 key-value heads
    config = train_config(Path("student"), Path("teacher"), rollout=RolloutConfig(tensor_parallel=ranks))
    found = layout_problems(config, 8, {"student": student})
    assert any(line.startswith(beginning) for line in found), found


SMOL = {"num_attention_heads": 9, "num_key_value_heads": 3, "num_hidden_layers": 30, "intermediate_size": 1536}
SMOL_26 = SMOL | {"num_hidden_layers": 26}


@pytest.mark.parametrize(
    ("nproc", "parallel", "line"),
    [
        (
            2,
            {"tensor": 2},
            "parallel.tensor = 2 does not divide the 9 attention heads of the student and the teacher and the 3"
            " key-value heads of the student and the teacher: choose one of 1, or another --nproc",
        ),
        (
            6,
            {"tensor": 2},
            "parallel.tensor = 2 does not divide the 9 attention heads of the student and the teacher and the 3"
            " key-value heads of the student and the teacher: choose one of 1, 3",
        ),
        (2, {"tensor": 3}, "parallel.tensor = 3 does not divide the 2 ranks: choose one of 1, or another --nproc"),
        (
            4,
            {"tensor": 1, "pipeline": 4},
            "parallel.pipeline = 4 does not divide the 26 layers of the student and the 30 layers of the teacher:"
            " choose one of 1, 2",
        ),
        (
            4,
            {"tensor": 3, "pipeline": 2},
            "parallel.tensor = 3 with parallel.pipeline = 2 puts a model on 6 ranks, which does not divide the 4 ranks:"
            " choose sizes with a product of 1, 2, or another --nproc",
        ),
    ],
)
def test_a_setting_has_one_line_and_every_size_that_it_names_fits(
    nproc: int, parallel: dict[str, Any], line: str
) -> None:
    assert problems(nproc, SMOL_26, SMOL, **parallel) == [line]


@pytest.mark.parametrize(
    ("nproc", "others"), [(120, {}), (120, {"pipeline": 2}), (120, {"pipeline": 6}), (40, {"context": 2})]
)
def test_a_size_is_named_if_and_only_if_the_layout_with_it_has_no_problem(nproc: int, others: dict[str, int]) -> None:
    student = {"num_attention_heads": 48, "num_key_value_heads": 12, "num_hidden_layers": 24, "intermediate_size": 960}
    teacher = student | {"num_key_value_heads": 16, "num_hidden_layers": 36}
    (line,) = problems(nproc, student, teacher, tensor=5, **others)
    named = line.rpartition("choose one of ")[2].partition(", or")[0].split(", ")
    sizes = range(1, nproc + 1)
    fit = [size for size in sizes if not problems(nproc, student, teacher, tensor=size, batch=960, **others)]
    assert [int(size) for size in named] == fit and len(fit) > 1


def test_one_problem_is_told_once() -> None:
    """A teacher with the student's layout has the same wrong product of sizes."""
    assert len([line for line in problems(6, tensor=2, pipeline=2) if "puts a model" in line]) == 1


def test_a_virtual_pipeline_needs_a_pipeline() -> None:
    with pytest.raises(ConfigError, match=r"parallel.virtual_pipeline = 2 needs a pipeline"):
        ParallelConfig(virtual_pipeline=2)
