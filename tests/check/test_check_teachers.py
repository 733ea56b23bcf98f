"""`prune-opd check` looks at each of several teachers, and names it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from prune_opd.check.notes import check_notes
from prune_opd.check.run import check_everything, check_train
from prune_opd.config import TeacherConfig, TeacherLayout, TrainConfig
from prune_opd.config.recipe import load_recipe
from tests.models import write_model


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    folder, one = tmp_path_factory.mktemp("models"), load_recipe("tiny_compatible")
    assert isinstance(one, TrainConfig)
    teachers = {name: TeacherConfig(str(write_model(folder / name)), (name,)) for name in ("ledger", "other")}
    student = str(write_model(folder / "student"))
    return dataclasses.replace(one, student=student, teacher="", teachers=teachers, memory=one.memory)


def other(config: TrainConfig, path: Path | str, **parallel: int) -> TrainConfig:
    teacher = dataclasses.replace(config.teachers["other"], path=str(path), parallel=TeacherLayout(**parallel))
    return dataclasses.replace(config, teachers={**config.teachers, "other": teacher})


def test_two_good_teachers_have_no_problem(config: TrainConfig) -> None:
    assert check_train(config, 2, None, "auto") == []


def test_a_teacher_that_is_not_there_is_named(config: TrainConfig) -> None:
    (problem,) = check_train(other(config, "absent"), 2, None, "auto")
    assert problem.startswith("teachers.other.path = 'absent'")


def test_a_teacher_of_another_tokenizer_is_named(config: TrainConfig, tmp_path: Path) -> None:
    path = write_model(tmp_path / "swapped")
    tokenizer = json.loads((path / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["s1"], vocabulary["s2"] = vocabulary["s2"], vocabulary["s1"]
    (path / "tokenizer.json").write_text(json.dumps(tokenizer))
    (problem,) = check_train(other(config, path), 2, None, "auto")
    assert f"teachers.other.path = {str(path)!r} has another tokenizer than the student" in problem


def test_a_layout_that_cannot_be_is_named(config: TrainConfig) -> None:
    path = config.teachers["other"].path
    problems = check_train(other(config, path, tensor=3), 2, None, "auto")
    assert problems and all("teachers.other.parallel.tensor = 3" in problem for problem in problems)


def test_weights_of_each_are_looked_at(config: TrainConfig, tmp_path: Path) -> None:
    path = write_model(tmp_path / "broken")
    (path / "model.safetensors").write_bytes(b"nothing")
    problems = check_everything(other(config, path), 2, tmp_path / "run")
    assert any("teachers.other.path" in problem for problem in problems), problems


def test_a_teacher_of_nothing_is_noted(config: TrainConfig) -> None:
    (note,) = [note for note in check_notes(config) if "teaches none" in note]
    assert "teachers.other" in note
