"""Several teachers as settings: what goes together, how they are written and read, and what a change of them means."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from prune_opd.config import HorizonConfig, ObjectiveConfig, TeacherConfig, TeacherLayout, TrainConfig
from prune_opd.config.changes import changes, is_harmless
from prune_opd.config.overrides import apply_overrides
from prune_opd.config.recipe import load_recipe
from prune_opd.config.yaml import config_differences, load_config, save_config
from prune_opd.errors import ConfigError


def several(**of: Any) -> TrainConfig:
    one = load_recipe("tiny_compatible")
    assert isinstance(one, TrainConfig)
    teachers = {"books": TeacherConfig("dir/books", ("ledger",)), "other": TeacherConfig("dir/other")}
    return dataclasses.replace(one, **{"teacher": "", "teachers": teachers} | of)


def with_books(**changes: Any) -> TrainConfig:
    """`several` with other settings of the teacher books."""
    config = several()
    books = dataclasses.replace(config.teachers["books"], **changes)
    return dataclasses.replace(config, teachers={**config.teachers, "books": books})


def test_each_teacher_has_the_runs_settings_but_its_own() -> None:
    horizon = HorizonConfig("full", max_len=50, min_len=1)
    config = with_books(parallel=TeacherLayout(tensor=2), objective=ObjectiveConfig("sampled_token"), horizon=horizon)
    books, other = config.by_teacher.values()
    assert (books.teacher, books.objective.name, books.parallel.teacher_tensor) == ("dir/books", "sampled_token", 2)
    assert books.horizon == horizon and books.teachers == {}
    assert (other.teacher, other.objective, other.horizon) == ("dir/other", config.objective, config.horizon)
    one = load_recipe("tiny_compatible")
    assert isinstance(one, TrainConfig) and one.by_teacher == {"": one}


def test_they_are_written_and_read_as_they_are(tmp_path: Path) -> None:
    config = with_books(weight=0.25, objective=ObjectiveConfig(k=3))
    save_config(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == config


def test_overrides_change_one_and_add_one() -> None:
    config = several()
    new = apply_overrides(config, ["teachers.books.weight=2", "teachers.third.path=dir/third"])
    assert config_differences(config, new) == ["teachers.books.weight: 1.0 → 2.0", "teachers.third: null → dir/third"]


def test_another_teacher_is_another_run_and_another_layout_is_not(tmp_path: Path) -> None:
    config = several()
    save_config(config, tmp_path / "config.yaml")
    third = dataclasses.replace(config, teachers={**config.teachers, "third": TeacherConfig("dir/third")})
    (change,) = changes(third, tmp_path, "auto")
    assert change.startswith("teachers.third: null") and not is_harmless(change)
    (change,) = changes(with_books(parallel=TeacherLayout(tensor=2)), tmp_path, "auto")
    assert is_harmless(change)
    (change,) = changes(with_books(weight=2.0), tmp_path, "auto")
    assert not is_harmless(change)


@pytest.mark.parametrize(
    ("override", "text"),
    (
        ("teacher=dir/one", r"teacher = 'dir/one' and teachers = books, other are both set"),
        ("teachers.books.weight=0", r"teachers\.books: .*weight = 0\.0 is out of range"),
        ("teachers.books.weigh=1", r"did you mean teachers\.books\.weight"),
        ("teachers.absent.weight=1", r"there is no setting 'teachers\.absent\.weight'"),
        ("teachers.a-b.path=x", r"teachers has the name 'a-b'"),
        ("teachers=none", r"as in teachers\.NAME\.path"),
        ("teachers.other.sources=ledger", r"both have 'ledger'"),
        ("teachers.books.sources=else", r"no teacher has the source 'ledger'.*teachers\.books, teachers\.other"),
        ("data.source=reasoning_gym/gcd", r"no teacher has the source 'reasoning_gym/gcd'"),
    ),
)
def test_bad_settings_are_named(override: str, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        apply_overrides(several(), [override])


@pytest.mark.parametrize(
    ("own", "text"),
    (
        ({"horizon": HorizonConfig("full", max_len=9999, min_len=1)}, r"teachers\.books\.horizon\.max_len = 9999"),
        ({"objective": ObjectiveConfig(ends="class")}, r"teachers\.books\.objective\.ends = 'class'"),
        ({"objective": ObjectiveConfig(temperature=0.5)}, r"teachers\.books\.objective\.temperature = 0\.5"),
    ),
)
def test_what_the_teachers_must_share_is_refused_where_it_differs(own: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        with_books(**own)


def test_no_teacher_at_all_is_refused() -> None:
    with pytest.raises(ConfigError, match="teacher is not set"):
        several(teachers={})
    with pytest.raises(ConfigError, match=r"data\.teacher_column = 'who'"):
        apply_overrides(load_recipe("tiny_compatible"), ["data.teacher_column=who"])
