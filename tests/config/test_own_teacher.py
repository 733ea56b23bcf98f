"""The student as its own teacher, and a teacher with prompts of its own: settings, checks, notes, plan."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from prune_opd.check.notes import check_notes
from prune_opd.check.run import check_structure, check_train
from prune_opd.config import TrainConfig
from prune_opd.config.changes import is_harmless
from prune_opd.config.overrides import apply_overrides
from prune_opd.config.recipe import load_recipe
from prune_opd.config.yaml import config_differences
from prune_opd.errors import ConfigError
from prune_opd.plan.fit import largest_fit
from prune_opd.plan.memory import plan_memory
from prune_opd.plan.planner import plan_run
from prune_opd.plan.setting import setting_of
from prune_opd.plan.time import step_time
from tests.fake_models import train_config, write_model

LARGE = "r1_7b_from_skywork_8xh100"
HINT = ("data.teacher_prompt={prompt} {solution}", "data.max_teacher_prompt_len=9000")


@pytest.fixture
def pair(tmp_path: Path) -> TrainConfig:
    config = train_config(write_model(tmp_path / "student"), write_model(tmp_path / "teacher"))
    return apply_overrides(config, ["gate.k=4"])


def recipe(*overrides: str) -> TrainConfig:
    config = load_recipe(LARGE)
    assert isinstance(config, TrainConfig)
    return apply_overrides(config, list(overrides))


def test_the_students_directory_is_the_teachers_where_it_teaches_itself(pair: TrainConfig) -> None:
    assert pair.model_dirs == {"student": pair.student, "teacher": pair.teacher}
    for teacher in ("student", "ema"):
        own = apply_overrides(pair, [f"teacher={teacher}"])
        assert own.model_dirs == {"student": pair.student, "teacher": pair.student}
        assert check_structure(own, 1) == []
        assert check_train(own, 1, None, "never") == []
    assert replace(pair, teacher="./student").model_dirs["teacher"] == "./student"


@pytest.mark.parametrize("role", ["student_fp8", "teacher_fp8"])
def test_an_average_of_weights_in_fp8_is_refused(pair: TrainConfig, role: str) -> None:
    fp8 = ["precision.params=bf16", f"precision.{role}.format=e4m3"]
    apply_overrides(pair, ["teacher=ema", *fp8])
    with pytest.raises(ConfigError, match=rf"teacher = ema with precision\.{role}\.param = true: .* stands still"):
        apply_overrides(pair, ["teacher=ema", *fp8, f"precision.{role}.param=true"])


def test_a_decay_that_is_none_or_has_no_average_is_refused(pair: TrainConfig) -> None:
    for decay in ("1", "-0.1"):
        with pytest.raises(ConfigError, match=r"teacher_ema\.decay"):
            apply_overrides(pair, ["teacher=ema", f"teacher_ema.decay={decay}"])
    with pytest.raises(ConfigError, match=r"teacher_ema\.decay = 0\.5 with teacher = .*: there is no average"):
        apply_overrides(pair, ["teacher_ema.decay=0.5"])


def test_another_teacher_hint_or_decay_makes_another_run(pair: TrainConfig) -> None:
    ema = apply_overrides(pair, ["teacher=ema"])
    for change in ("teacher=student", "teacher_ema.decay=0.5", "data.teacher_prompt=prompt"):
        source = ["data.source=ledger"]
        lines = config_differences(apply_overrides(ema, source), apply_overrides(ema, [*source, change]))
        assert lines and not any(map(is_harmless, lines)), change


def test_a_teacher_that_reads_and_knows_the_same_gets_a_note(pair: TrainConfig) -> None:
    (note,) = check_notes(apply_overrides(pair, ["teacher=student"]))
    assert "data.teacher_prompt = null" in note and "nothing to teach" in note
    assert check_notes(apply_overrides(pair, ["teacher=student", "data.teacher_prompt={prompt} {answer}"])) == []
    assert check_notes(pair) == []


def test_the_teachers_positions_must_hold_its_own_prompt(pair: TrainConfig) -> None:
    config = apply_overrides(pair, ["data.teacher_prompt=solution", "data.max_teacher_prompt_len=500"])
    (line,) = check_train(config, 1, None, "never")
    assert line.startswith(f"data.max_teacher_prompt_len + horizon.max_len = 500 + {pair.horizon.max_len} is above")
    assert "of the teacher" in line


# ---------------------------------------------------------------------------------------------------- the plan


def test_a_longer_prompt_costs_the_teachers_pass_and_nothing_else() -> None:
    plain, hinted = (plan_run(recipe(*more), "h100", 1) for more in ((), HINT))
    before, after = (found.planned.seconds for found in (plain, hinted))
    assert after["teacher"] > 1.2 * before["teacher"]
    assert all(after[phase] == before[phase] for phase in before if phase != "teacher")
    assert hinted.memory.working["train"] == plain.memory.working["train"]
    # Above a micro-batch's tokens one row alone is longer, and its pass is the fullest moment.
    rows = [plan_run(recipe(HINT[0], f"data.max_teacher_prompt_len={n}"), "h100", 1) for n in (80_000, 160_000)]
    assert rows[1].memory.working["teacher"] > 1.5 * rows[0].memory.working["teacher"]


def test_a_hint_bounds_the_horizon_by_the_teachers_positions() -> None:
    found = [largest_fit(setting_of(recipe(*more), "h100", 1)) for more in ((), HINT)]
    positions = setting_of(recipe(), "h100", 1).teacher.max_positions
    assert found[1][1] <= min(found[0][1], positions - 9000)


def test_an_average_has_a_phase_of_its_own_with_both_models_there() -> None:
    offloads = [f"memory.offload_{part}=true" for part in ("student", "gradients", "optimizer", "teacher")]
    own, ema = (setting_of(recipe(*offloads, f"teacher={t}"), "h100", 1) for t in ("student", "ema"))
    plain, averaged = plan_memory(own), plan_memory(ema)
    assert set(averaged.resident) - set(plain.resident) == {"average"}
    assert averaged.resident["average"] > averaged.resident["teacher"]
    assert averaged.parts == plain.parts  # the average itself lies in host memory
    assert step_time(ema, 2000, averaged.cache_tokens).seconds == step_time(own, 2000, plain.cache_tokens).seconds
