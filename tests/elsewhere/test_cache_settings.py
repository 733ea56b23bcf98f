"""What a teacher's cache refuses before a model is built, what it notes, and what a plan makes of it."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from prune_opd.check.elsewhere import cache_folder_problems, cache_notes
from prune_opd.check.run import check_train
from prune_opd.config import TeacherCacheConfig, TrainConfig
from prune_opd.config import memory_phases as phases
from prune_opd.config.changes import is_harmless
from prune_opd.config.overrides import apply_overrides
from prune_opd.config.recipe import load_recipe
from prune_opd.elsewhere.row_store import RowStore, row_key
from prune_opd.errors import ConfigError
from prune_opd.plan.planner import plan_run
from tests.fake_models import train_config, write_model

FIXED = ("rollout.refresh_every=0", "horizon.strategy=full", "teacher_cache.mode=only", "teacher_cache.dir=rows")


@pytest.fixture
def pair(tmp_path: Path) -> TrainConfig:
    config = train_config(write_model(tmp_path / "student"), write_model(tmp_path / "teacher"))
    cache = TeacherCacheConfig(mode="use", dir=str(tmp_path / "rows"), max_gb=1e-3)
    return dataclasses.replace(config, teacher_cache=cache)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["teacher_cache.mode=use"], r"teacher_cache\.dir is not set: teacher_cache\.mode = use needs a folder"),
        (["teacher_cache.mode=on"], r"teacher_cache\.mode = 'on' is not known: choose one of off, use, only"),
        (["teacher_cache.max_gb=0"], r"teacher_cache\.max_gb = 0(\.0)? is out of range"),
        (["teacher_cache.mode=only", "teacher_cache.dir=rows"], r"rollout\.refresh_every = 1: the student moves"),
        ([*FIXED, "rollout.refresh_every=2"], r"rollout\.refresh_every = 2: the student moves"),
        ([*FIXED, "rollout.inflight.mode=gate", "rollout.inflight.first_check=32"], r"rollout\.inflight\.mode = gate"),
    ],
)
def test_bad_settings_are_refused_by_name(overrides: list[str], message: str) -> None:
    config: Any = load_recipe("tiny_compatible")
    apply_overrides(config, list(FIXED))
    with pytest.raises(ConfigError, match=message):
        apply_overrides(config, overrides)


def test_a_folder_that_cannot_be_written_or_has_no_room_is_a_problem(pair: TrainConfig, tmp_path: Path) -> None:
    assert cache_folder_problems(pair) == [] and not (tmp_path / "rows").exists()
    with mock.patch.object(shutil, "disk_usage", return_value=mock.Mock(free=5 * 10**5)):
        (problem,) = cache_folder_problems(pair)
    assert "teacher_cache.max_gb = 0.001" in problem and "0.0 GB are free" in problem
    (tmp_path / "rows").write_text("a file")
    (problem,) = cache_folder_problems(pair)
    assert problem.startswith("teacher_cache.dir") and "is a file" in problem
    assert problem in check_train(pair, 2, None, "auto")


def test_only_needs_a_folder_with_rows(pair: TrainConfig, tmp_path: Path) -> None:
    only = apply_overrides(pair, [*FIXED, f"teacher_cache.dir={tmp_path / 'rows'}"])
    (problem,) = cache_folder_problems(only)
    assert "has no rows: run once with teacher_cache.mode=use" in problem
    RowStore(tmp_path / "rows", "0" * 32, 10**6).write(row_key((1,), (2,)), {"hidden_TH": torch.ones(1, 8)})
    assert cache_folder_problems(only) == []


def test_notes_say_what_would_be_thrown_out_before_it_is_needed(pair: TrainConfig) -> None:
    (moving, large) = cache_notes(dataclasses.replace(pair, steps=1000))
    assert "rollout.refresh_every = 1: the student moves" in moving
    # 1000 steps of 4 prompts with 2 responses of at most 256 tokens, of 64 numbers in fp32
    assert f"{1000 * 8 * 256 * 64 * 4 / 1e9:.3g} GB" in large
    fixed = apply_overrides(pair, ["rollout.refresh_every=0", "horizon.strategy=full", "teacher_cache.max_gb=1"])
    assert cache_notes(fixed) == []


def test_a_run_may_go_on_with_another_cache() -> None:
    assert is_harmless("teacher_cache.mode: use → only") and is_harmless("teacher_cache.dir: a → b")


def test_a_plan_gives_a_teacher_without_layers_neither_memory_nor_operations() -> None:
    recipe: Any = load_recipe("r1_1_5b_from_r1_7b_8xh100")
    fixed = apply_overrides(recipe, list(FIXED[:2]))
    here, away = (plan_run(config, "h100", 1) for config in (fixed, apply_overrides(fixed, list(FIXED))))
    assert here.memory.parts[phases.TEACHER] > 10**9 and away.memory.parts[phases.TEACHER] == 0
    assert away.memory.parts[phases.TEACHER_HEAD] == here.memory.parts[phases.TEACHER_HEAD] > 0
    assert away.memory.working["teacher"] < here.memory.working["teacher"]
    assert away.planned.seconds["teacher"] < 0.2 * here.planned.seconds["teacher"]
    assert away.planned.seconds["train"] == here.planned.seconds["train"]
