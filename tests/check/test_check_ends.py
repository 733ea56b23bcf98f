"""What `prune-opd check` says of a pair whose models end a response with different tokens."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from prune_opd.check.ends import end_notes
from prune_opd.check.run import check_train
from prune_opd.config import GateConfig, ObjectiveConfig, TrainConfig
from prune_opd.config.recipe import load_recipe
from prune_opd.config.yaml import from_dict
from tests.fake_models import train_config, write_model

CLASS = ObjectiveConfig(k=16, ends="class")


@pytest.fixture
def pair(tmp_path: Path) -> TrainConfig:
    """A student that ends with 1, a teacher that prefers 0 and takes 1 too."""
    student = write_model(tmp_path / "student", eos_token_id=1)
    teacher = write_model(tmp_path / "teacher", eos_token_id=0)
    (teacher / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, 1]}))
    return train_config(student, teacher)


def test_an_end_in_common_is_no_help_and_the_note_says_what_is(pair: TrainConfig) -> None:
    assert check_train(pair, 2, None, "auto") == []
    (note,) = end_notes(pair)
    assert "the student ends its responses with the id 1 and the teacher with 0" in note
    assert "set objective.ends=class" in note
    classed = replace(pair, objective=CLASS)
    assert end_notes(classed) == check_train(classed, 2, None, "auto") == []
    assert end_notes(replace(pair, teacher=pair.student)) == []


def test_no_end_in_common_needs_the_class(pair: TrainConfig) -> None:
    (Path(pair.teacher) / "generation_config.json").unlink()
    (line,) = check_train(pair, 2, None, "auto")
    assert "ends with the ids [0] and the student with [1]" in line and "set objective.ends=class" in line
    assert check_train(replace(pair, objective=CLASS), 2, None, "auto") == []


def test_a_class_needs_ids_and_outcomes_beside_it(pair: TrainConfig, tmp_path: Path) -> None:
    silent = [write_model(tmp_path / name) for name in ("s", "t")]
    (line,) = check_train(train_config(*silent, objective=CLASS), 2, None, "auto")
    assert "objective.ends = class: neither student" in line and "set objective.ends=as_is" in line
    for objective, gate, named in (
        (replace(CLASS, k=32), pair.gate, "objective.k = 32"),
        (CLASS, GateConfig(k=32), "gate.k = 32"),
    ):
        (line,) = check_train(replace(pair, objective=objective, gate=gate), 2, None, "auto")
        assert f"{named} is above the 31 outcomes" in line and "set it to at most 31" in line
    assert check_train(replace(pair, objective=replace(CLASS, k=31)), 2, None, "auto") == []


@pytest.mark.parametrize("recipe", ["qwen3_1_7b_base_from_4b_8xh100", "qwen3_4b_base_from_4b_8xh100"])
def test_the_papers_pairs_of_a_base_and_a_chat_model_set_the_class(recipe: str) -> None:
    config = load_recipe(recipe)
    assert isinstance(config, TrainConfig) and config.objective == ObjectiveConfig(ends="class")
    other = load_recipe("r1_1_5b_from_justrl_8xh100")
    assert isinstance(other, TrainConfig) and other.objective.ends == "as_is"


def test_a_config_of_before_is_read_as_it_was() -> None:
    assert from_dict(ObjectiveConfig, {"name": "topk_reverse_kl", "k": 16}).ends == "as_is"
