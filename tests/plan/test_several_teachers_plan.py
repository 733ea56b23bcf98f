"""A plan with several teachers: their parts, their turns, their shares."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from prune_opd.config import DataConfig, TeacherConfig, TeacherLayout, TrainConfig
from prune_opd.config.memory_phases import TEACHER, part_of
from prune_opd.config.recipe import load_recipe
from prune_opd.errors import ConfigError
from prune_opd.plan.planner import Plan, plan_run
from prune_opd.plan.search import best_layouts
from prune_opd.plan.setting import shares

SMALL = "r1_1_5b_from_justrl_8xh100"


def plan_of(config: TrainConfig) -> Plan:
    return plan_run(config, "h100", 1)


def one() -> TrainConfig:
    config = load_recipe(SMALL)
    assert isinstance(config, TrainConfig)
    return config


def two(**memory: Any) -> TrainConfig:
    """The recipe's own teacher twice, on halves of the data."""
    config = one()
    return dataclasses.replace(
        config,
        teacher="",
        teachers={"a": TeacherConfig(config.teacher), "b": TeacherConfig(config.teacher)},
        data=DataConfig(mixture=("a.jsonl", "b.jsonl")),
        memory=dataclasses.replace(config.memory, **memory),
    )


def test_the_same_teacher_twice_takes_its_bytes_twice_and_its_time_once() -> None:
    alone, both = plan_of(one()), plan_of(two())
    for name in "ab":
        assert both.memory.parts[part_of(name)] == alone.memory.parts[TEACHER]
    assert both.planned.seconds["teacher"] == pytest.approx(alone.planned.seconds["teacher"], rel=0.05)
    assert both.planned.seconds["rollout"] == alone.planned.seconds["rollout"]


def test_in_turn_only_one_teachers_layers_are_resident() -> None:
    plan = plan_of(two(offload_teacher=True))
    kept, size = plan_of(two(offload_teacher=False)), plan.memory.parts[part_of("a")]
    for phase in ("teacher a", "teacher b"):
        assert kept.memory.resident[phase] - plan.memory.resident[phase] == pytest.approx(size)
    less = kept.memory.resident["train"] - plan.memory.resident["train"]
    assert less == pytest.approx(2 * size)


def test_each_has_its_own_layout() -> None:
    config = two()
    cut = dataclasses.replace(config.teachers["a"], parallel=TeacherLayout(tensor=2))
    plan = plan_of(dataclasses.replace(config, teachers={**config.teachers, "a": cut}))
    assert plan.memory.parts[part_of("a")] < 0.6 * plan.memory.parts[part_of("b")]
    bad = dataclasses.replace(config.teachers["a"], parallel=TeacherLayout(tensor=5))
    plan = plan_of(dataclasses.replace(config, teachers={**config.teachers, "a": bad}))
    assert any("teachers.a.parallel.tensor = 5" in problem for problem in plan.problems)


def test_shares_are_those_of_the_data() -> None:
    config = two()
    data = dataclasses.replace(config.data, weights=(3.0, 1.0))
    assert shares(dataclasses.replace(config, data=data)) == {"a": 0.75, "b": 0.25}
    data = dataclasses.replace(config.data, teacher_column="who")
    assert shares(dataclasses.replace(config, data=data)) == {"a": 0.5, "b": 0.5}


def test_the_search_refuses_several() -> None:
    with pytest.raises(ConfigError, match="plan --search with teachers = a, b"):
        best_layouts(two(), "h100", 1)
