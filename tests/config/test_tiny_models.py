"""The tiny models that come with the package: of today's recipes, in bf16, small; and what takes their place."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from prune_opd.config import SftConfig, TrainConfig, paths
from prune_opd.config.paths import config_digest, shipped_models_dir, tiny_model, tiny_model_dir
from prune_opd.config.recipe import load_recipe
from prune_opd.config.yaml import load_config
from prune_opd.errors import ConfigError

RECIPES = {
    "base": "tiny_base",
    "teacher": "tiny_teacher",
    "student": "tiny_student",
    "drift-teacher": "tiny_drift_teacher",
    "drift-student": "tiny_drift_student",
}
MOST_BYTES = 7_000_000
REMEDY = "run `make tiny-models` and scripts/ship_tiny_models.py, and commit what they wrote"


@pytest.fixture(autouse=True)
def no_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PRUNE_OPD_TINY_MODELS", raising=False)


def recipe(name: str) -> SftConfig:
    config = load_recipe(RECIPES[name])
    assert isinstance(config, SftConfig)
    return config


def compatible() -> TrainConfig:
    config = load_recipe("tiny_compatible")
    assert isinstance(config, TrainConfig)
    return config


# ---------------------------------------------------------------------------------------------------- the files


def test_the_index_names_the_five_models() -> None:
    index = json.loads((shipped_models_dir() / "index.json").read_text())
    assert list(index) == list(RECIPES)
    assert {path.name for path in shipped_models_dir().iterdir()} == {*RECIPES, "index.json"}


@pytest.mark.parametrize("name", RECIPES)
def test_a_shipped_model_is_of_its_recipe_as_it_is(name: str) -> None:
    shipped = json.loads((shipped_models_dir() / "index.json").read_text())[name]["digest"]
    now = config_digest(recipe(name))
    assert shipped == now, (
        f"{shipped_models_dir() / name} was made by {RECIPES[name]} with the digest {shipped}, and the recipe, or one"
        f" that it descends from, has changed since (digest {now}): {REMEDY}"
    )
    made = load_config(shipped_models_dir() / name / "sft_config.yaml")
    assert isinstance(made, SftConfig) and config_digest(made) == shipped, f"sft_config.yaml is another's: {REMEDY}"
    assert not Path(made.output).is_absolute()  # of the machine that made it


def test_the_shipped_models_are_small() -> None:
    sizes = {path: path.stat().st_size for path in shipped_models_dir().rglob("*") if path.is_file()}
    assert sum(sizes.values()) <= MOST_BYTES, sizes


@pytest.mark.parametrize("name", RECIPES)
def test_shipped_weights_are_bf16_and_finite(name: str) -> None:
    tensors = load_file(shipped_models_dir() / name / "model.safetensors")
    assert len(tensors) == 2 + 11 * recipe(name).shape.layers
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert all(tensor.isfinite().all() and tensor.any() for tensor in tensors.values())
    assert json.loads((shipped_models_dir() / name / "config.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.parametrize("name", RECIPES)
def test_transformers_loads_a_shipped_model(name: str) -> None:
    """Whole and with nothing left over, in the dtype of its files and in the trainer's."""
    model, loading = AutoModelForCausalLM.from_pretrained(shipped_models_dir() / name, output_loading_info=True)
    assert not any(loading[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys")), loading
    assert model.dtype == torch.bfloat16
    wide = AutoModelForCausalLM.from_pretrained(shipped_models_dir() / name, dtype=torch.float32)
    for (key, short), long in zip(model.state_dict().items(), wide.state_dict().values(), strict=True):
        assert torch.equal(short.float(), long), key


# ---------------------------------------------------------------------------------------------------- who takes which


def test_the_tiny_recipes_take_the_shipped_models() -> None:
    assert Path(compatible().student) == shipped_models_dir() / "student"
    assert Path(compatible().teacher) == shipped_models_dir() / "teacher"
    drift = load_recipe("tiny_drift")
    assert isinstance(drift, TrainConfig)
    assert Path(drift.student) == shipped_models_dir() / "drift-student"
    assert Path(drift.teacher) == shipped_models_dir() / "drift-teacher"


def test_trained_models_are_taken_from_the_cache_on_request(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PRUNE_OPD_CACHE", str(tmp_path))
    monkeypatch.setenv("PRUNE_OPD_TINY_MODELS", "trained")
    for side in ("student", "teacher"):
        assert getattr(compatible(), side) == recipe(side).output
        assert Path(recipe(side).output).is_relative_to(tmp_path)


@pytest.mark.parametrize("setting", ["shipped", "trained"])
def test_training_anew_starts_from_the_cache_and_goes_there(
    setting: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PRUNE_OPD_CACHE", str(tmp_path))
    monkeypatch.setenv("PRUNE_OPD_TINY_MODELS", setting)
    chain = {"teacher": "base", "student": "teacher", "drift-teacher": "teacher", "drift-student": "drift-teacher"}
    for name, ancestor in chain.items():
        assert recipe(name).init == recipe(ancestor).output
        assert Path(recipe(name).output).is_relative_to(tmp_path)


def test_the_trap_pair_starts_from_the_shipped_teacher_and_is_another_one_when_that_changes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PRUNE_OPD_CACHE", str(tmp_path))
    config = load_recipe("tiny_trap_teacher")
    assert isinstance(config, SftConfig) and config.init == str(shipped_models_dir() / "teacher")
    assert Path(config.output).is_relative_to(tmp_path)
    digest = config_digest(config)
    before = paths.shipped_index()
    monkeypatch.setattr(paths, "shipped_index", lambda: {**before, "teacher": {**before["teacher"], "digest": "0"}})
    assert config_digest(config) != digest
    monkeypatch.undo()
    monkeypatch.setenv("PRUNE_OPD_CACHE", str(tmp_path))
    monkeypatch.setenv("PRUNE_OPD_TINY_MODELS", "trained")
    trained = load_recipe("tiny_trap_teacher")
    assert isinstance(trained, SftConfig) and trained.init == recipe("teacher").output
    assert config_digest(trained) != digest


def test_a_changed_recipe_is_not_given_the_model_of_the_old_one() -> None:
    longer = dataclasses.replace(recipe("student"), beta2=0.9)
    changed = dataclasses.replace(longer, output=str(tiny_model_dir("student", config_digest(longer))))
    assert tiny_model(changed) == changed.output


def test_another_value_of_the_setting_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PRUNE_OPD_TINY_MODELS", "fresh")
    with pytest.raises(ConfigError, match=r"PRUNE_OPD_TINY_MODELS = 'fresh' is not known: choose shipped or trained"):
        load_recipe("tiny_compatible")
