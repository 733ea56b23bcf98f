"""Recipes, overrides, config.yaml: what loads is what was meant, and a mistake is answered with what would be right."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import yaml

from prune_opd.config import CorpusConfig, HorizonConfig, RunConfig, SftConfig, SftStage, TrainConfig, paths
from prune_opd.config.overrides import apply_overrides
from prune_opd.config.recipe import list_recipes, load_recipe
from prune_opd.config.yaml import config_differences, load_config, save_config
from prune_opd.errors import ConfigError

STRATEGIES = ("full", "topd", "popd", "prune")


def tiny() -> TrainConfig:
    config = load_recipe("tiny_compatible")
    assert isinstance(config, TrainConfig)
    return config


def supervised() -> SftConfig:
    stages = (
        SftStage(steps=2, batch=4, lr=1e-3, corpus=CorpusConfig(slip=0.1)),
        SftStage(steps=3, batch=4, lr=1e-6, corpus=CorpusConfig(), sharpen=2.5),
    )
    return SftConfig(name="x", output="out", stages=stages)


# ---------------------------------------------------------------------------------------------------- loading


@pytest.mark.parametrize("name", list_recipes())
def test_every_recipe_loads_and_is_named_like_its_file(name: str) -> None:
    assert load_recipe(name).name == name
    assert list_recipes()[name], "a recipe's docstring says what it is"


def test_a_path_loads_the_same_recipe_as_its_name() -> None:
    assert load_recipe(str(paths.recipes_dir() / "tiny_compatible.py")) == tiny()


def test_an_unknown_name_is_answered_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"'tiny_compatibel' is not known: did you mean tiny_compatible"):
        load_recipe("tiny_compatibel")
    with pytest.raises(ConfigError, match=r"the recipes are .*tiny_compatible"):
        load_recipe("zzzzzz")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def other(): pass", r"has no function mine\(\)"),
        ("def mine(): return 3", r"mine\(\) returned int; return a TrainConfig"),
        ("def mine(needed): pass", r"mine\(\) missing 1 required positional argument"),
        ("import nowhere_to_be_found", r"line 1: ModuleNotFoundError: No module named"),
        ("\nx = (", r"line 2: SyntaxError"),
        ("from prune_opd.config import GateConfig\ndef mine(): return GateConfig(k=0)", r"gate\.k = 0 is out of range"),
    ],
)
def test_a_broken_recipe_file_is_refused_in_one_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "mine.py"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=message) as error:
        load_recipe(str(path))
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"there is no such \.py file"):
        load_recipe(str(tmp_path / "nothing.py"))


# ---------------------------------------------------------------------------------------------------- the tiny recipes


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_each_strategy_works_on_the_tiny_recipe_by_one_override(strategy: str) -> None:
    assert apply_overrides(tiny(), [f"horizon.strategy={strategy}"]).horizon.strategy == strategy


def test_a_changed_ancestor_moves_every_descendant() -> None:
    teacher = load_recipe("tiny_teacher")
    assert isinstance(teacher, SftConfig) and teacher.init is not None
    other_base = str(Path(teacher.init).parent.with_name("0123456789ab") / "base")
    moved = dataclasses.replace(teacher, init=other_base)
    assert paths.config_digest(moved) != paths.config_digest(teacher)
    assert paths.config_digest(dataclasses.replace(teacher, output="elsewhere")) == paths.config_digest(teacher)
    assert Path(teacher.output) == paths.tiny_model_dir("teacher", paths.config_digest(teacher))


def test_the_digest_does_not_depend_on_where_the_cache_lies(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PRUNE_OPD_CACHE", str(tmp_path / "a"))
    first = load_recipe("tiny_student")
    monkeypatch.setenv("PRUNE_OPD_CACHE", str(tmp_path / "b"))
    second = load_recipe("tiny_student")
    assert isinstance(first, SftConfig) and isinstance(second, SftConfig)
    assert Path(first.output).relative_to(tmp_path / "a") == Path(second.output).relative_to(tmp_path / "b")


# ---------------------------------------------------------------------------------------------------- config.yaml


@pytest.mark.parametrize("name", list_recipes())
def test_config_yaml_round_trips(name: str, tmp_path: Path) -> None:
    config = load_recipe(name)
    save_config(config, tmp_path / "new" / "config.yaml")
    assert load_config(tmp_path / "new" / "config.yaml") == config
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["config.yaml"]


@pytest.mark.parametrize(
    "text", ["1e-4", "-1E5", "2_0e3", " a ", "a\x85b", "\u2028", "a\n\n", "\t", "# x", "'q'", "null", "é\u0301"]
)
def test_a_text_in_config_yaml_stays_the_same_text(text: str, tmp_path: Path) -> None:
    data = dataclasses.replace(tiny().data, source="p.jsonl", suffix=text, system_prompt=text)
    config = dataclasses.replace(tiny(), data=data)
    save_config(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == config


def test_config_yaml_round_trips_without_a_gate_and_with_extreme_numbers(tmp_path: Path) -> None:
    config = apply_overrides(tiny(), ["horizon.strategy=full", "gate=null", "optimizer.eps=1e-300", "name='null: x'"])
    save_config(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == config


def test_a_list_in_a_recipe_is_as_good_as_a_tuple(tmp_path: Path) -> None:
    evaluation = dataclasses.replace(tiny().evaluation, sources=["a.jsonl", "b.jsonl"])  # type: ignore[arg-type]
    config = dataclasses.replace(tiny(), evaluation=evaluation)
    save_config(config, tmp_path / "config.yaml")
    assert config_differences(load_config(tmp_path / "config.yaml"), config) == []


def test_settings_that_have_left_the_config_are_read_where_they_did_nothing(tmp_path: Path) -> None:
    config, path = tiny(), tmp_path / "config.yaml"
    save_config(config, path)
    data = yaml.safe_load(path.read_text())
    data["horizon"] |= {"windows": [], "scatter": False}
    data["evaluation"] |= {"problems_between": None}
    path.write_text(yaml.safe_dump(data))
    assert load_config(path) == config
    data["horizon"]["windows"] = [64, 80]
    path.write_text(yaml.safe_dump(data))
    with pytest.raises(ConfigError, match=r"there is no setting 'horizon\.windows'"):
        load_config(path)


def test_config_yaml_is_in_the_order_of_the_dataclass(tmp_path: Path) -> None:
    save_config(tiny(), tmp_path / "config.yaml")
    data = yaml.safe_load((tmp_path / "config.yaml").read_text(encoding="utf-8"))
    assert list(data) == [field.name for field in dataclasses.fields(TrainConfig)]
    assert list(data["horizon"]) == [field.name for field in dataclasses.fields(HorizonConfig)]


def test_stages_come_back_as_dataclasses_in_a_tuple(tmp_path: Path) -> None:
    save_config(supervised(), tmp_path / "sft_config.yaml")
    loaded = load_config(tmp_path / "sft_config.yaml")
    assert loaded == supervised()
    assert isinstance(loaded, SftConfig) and isinstance(loaded.stages, tuple)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "name: x\nstudent: s\nteacher: t\nsteps: 3\nhorizon: {strategy: full}\nwidth: 3\n",
            "there is no setting 'width'",
        ),
        ("name: x\n", "student is not set, and it has no default"),
        (
            "name: x\nstudent: s\nteacher: t\nsteps: many\nhorizon: {strategy: full}\n",
            "'many' has the wrong type",
        ),
        ("name: x\nstudent: s\nteacher: t\nsteps: 0\nhorizon: {strategy: full}\n", "steps = 0 is out of range"),
        ("name: x\noutput: o\nstages: [3]\n", "3 stands where the settings of a SftStage belong"),
        (
            "name: x\noutput: o\nstages: [{stepps: 3}]\n",
            "'stages.0.stepps': did you mean stages.0.steps",
        ),
        ("- 3\n", "does not hold the settings of a run"),
        ("a: [\n", "cannot be read as YAML"),
    ],
)
def test_a_damaged_config_yaml_is_refused_with_its_path(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=message) as error:
        load_config(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_damaged_config_yaml_has_its_path_before_each_of_its_mistakes(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("name: x\nstudent: s\nteacher: t\nsteps: 0\nhorizon: {strategie: full}\nwidth: 3\n")
    with pytest.raises(ConfigError) as error:
        load_config(path)
    assert [line.split(": ")[:2] for line in str(error.value).splitlines()] == [
        [str(path), "there is no setting 'horizon.strategie'"],
        [str(path), "there is no setting 'width'"],
    ]


def test_a_missing_config_yaml_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no such file"):
        load_config(tmp_path / "config.yaml")


# ---------------------------------------------------------------------------------------------------- differences


def test_differences_name_every_changed_field() -> None:
    old = supervised()
    new = apply_overrides(old, ["stages.1.lr=0.5", "stages.0.corpus.slip=0.2", "init=base"])
    assert config_differences(old, new) == [
        "stages.0.corpus.slip: 0.1 → 0.2",
        "stages.1.lr: 1.0e-06 → 0.5",
        "init: null → base",
    ]
    assert config_differences(old, old) == []


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        (tiny(), supervised(), ["kind: TrainConfig → SftConfig"]),
        (supervised(), dataclasses.replace(supervised(), stages=()), "stages: [{steps: 2,"),
        (tiny(), apply_overrides(tiny(), ["horizon.strategy=full", "gate=null"]), "k: 4"),
    ],
)
def test_differences_of_shape_are_one_line(old: RunConfig, new: RunConfig, expected: list[str] | str) -> None:
    lines = config_differences(old, new)
    if isinstance(expected, list):
        assert lines == expected
    else:
        assert expected in lines[-1] and lines[-1].endswith(("→ []", "→ null"))


def test_the_digest_does_not_depend_on_parallelism_that_supervised_training_has_not() -> None:
    teacher = load_recipe("tiny_teacher")
    pipeline = dataclasses.replace(teacher.parallel, recompute="full", teacher_tensor=1)
    assert paths.config_digest(dataclasses.replace(teacher, parallel=pipeline)) == paths.config_digest(teacher)
