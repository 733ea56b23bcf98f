"""Recipes, overrides, config.yaml: what loads is what was meant, and a mistake is answered with what would be right."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import yaml

from prune_opd.config import CorpusConfig, DataConfig, HorizonConfig, RunConfig, SftConfig, SftStage, TrainConfig, paths
from prune_opd.config.overrides import SYMBOLS, apply_overrides, dotted_keys
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


# ---------------------------------------------------------------------------------------------------- overrides


def test_overrides_are_typed_and_change_nothing_else() -> None:
    old = tiny()
    new = apply_overrides(
        old,
        [
            "gate.k=8",
            "optimizer.lr=1e-4",
            "data.shuffle=false",
            "parallel.tensor=1",
            "evaluation.sources=x.jsonl",
            "name=12",
        ],
    )
    assert config_differences(old, new) == [
        "name: tiny_compatible → '12'",
        "gate.k: 4 → 8",
        "data.shuffle: true → false",
        "optimizer.lr: 0.0003 → 0.0001",
        "parallel.tensor: null → 1",
        "evaluation.sources: [] → [x.jsonl]",
    ]
    assert new.name == "12"
    assert apply_overrides(old, []) == old


def test_objective_weighting_and_updates_are_chosen_by_dotted_keys() -> None:
    new = apply_overrides(
        tiny(),
        [
            "objective.name=full_vocab_jsd",
            "objective.beta=0.1",
            "weighting.name=iw_opd",
            "weighting.gamma=1",
            "optimizer.updates_per_batch=2",
        ],
    )
    assert (new.objective.name, new.objective.beta) == ("full_vocab_jsd", 0.1)
    assert (new.weighting.name, new.weighting.gamma, new.optimizer.updates_per_batch) == ("iw_opd", 1, 2)
    with pytest.raises(ConfigError, match=r"^objective\.name = 'jsd' is not known: choose one of topk_reverse_kl, "):
        apply_overrides(tiny(), ["objective.name=jsd"])


def test_a_setting_within_a_stage_can_be_overridden() -> None:
    new = apply_overrides(supervised(), ["stages.1.corpus.slip=0.5", "stages.0.steps=7"])
    assert isinstance(new.stages[1], SftStage)
    assert (new.stages[1].corpus.slip, new.stages[0].steps) == (0.5, 7)


def test_the_gate_can_be_taken_out_and_then_has_no_settings() -> None:
    no_gate = ["horizon.strategy=full", "gate=null"]
    assert apply_overrides(tiny(), no_gate).gate is None
    with pytest.raises(ConfigError, match=r"^gate\.k: gate is null.*leave out gate=null"):
        apply_overrides(tiny(), [*no_gate, "gate.k=4"])


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("horizon.stratgy", "horizon.strategy"),
        ("horizn.max_len", "horizon.max_len"),
        ("strategy", "horizon.strategy"),
        ("stratgy", "horizon.strategy"),
        ("gate.kk", "gate.k"),
        ("gate.k.x", "gate.k"),
        ("k", "gate.k or objective.k"),
        ("optimiser.lr", "optimizer.lr"),
        ("gate.gama", "gate.threshold"),
        ("gate.gamma", "gate.threshold"),
        ("gate.γ", "gate.threshold"),
        ("γ", "gate.threshold"),
        ("gamma", "gate.threshold or weighting.gamma"),
        ("weighting.gama", "weighting.gamma"),
        ("horizon.M_0", "horizon.init_len"),
    ],
)
def test_a_misspelt_key_is_answered_with_the_nearest(key: str, nearest: str) -> None:
    with pytest.raises(ConfigError) as error:
        apply_overrides(tiny(), [f"{key}=1"])
    assert str(error.value) == f"there is no setting {key!r}: did you mean {nearest}?"


def test_every_symbol_stands_for_a_setting() -> None:
    assert set(SYMBOLS.values()) <= set(dotted_keys(TrainConfig))


def test_all_bad_keys_and_values_are_reported_at_once() -> None:
    bad = ["gate.gama=.5", "steps=7", "optimiser.lr=1", "gate.k=four", "gate.gama=.6"]
    with pytest.raises(ConfigError) as error:
        apply_overrides(tiny(), bad)
    assert [line.split(":")[0] for line in str(error.value).splitlines()] == [
        "there is no setting 'gate.gama'",
        "there is no setting 'optimiser.lr'",
        "gate.k = 'four' has the wrong type",
    ]
    with pytest.raises(ConfigError) as error:
        apply_overrides(tiny(), ["gate.k=0", "gate.threshold=7", "optimizer.lr=-1"])
    assert [line.split(" is out of range")[0] for line in str(error.value).splitlines()] == [
        "gate.k = 0",
        "gate.threshold = 7.0",
        "optimizer.lr = -1.0",
    ]


def test_a_damaged_config_yaml_has_its_path_before_each_of_its_mistakes(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("name: x\nstudent: s\nteacher: t\nsteps: 0\nhorizon: {strategie: full}\nwidth: 3\n")
    with pytest.raises(ConfigError) as error:
        load_config(path)
    assert [line.split(": ")[:2] for line in str(error.value).splitlines()] == [
        [str(path), "there is no setting 'horizon.strategie'"],
        [str(path), "there is no setting 'width'"],
    ]


@pytest.mark.parametrize(
    ("override", "suffix"),
    [
        ("data.suffix= Put the answer in a box.", " Put the answer in a box."),
        ("data.suffix= Put it in \\boxed{}. ", " Put it in \\boxed{}. "),
        ("data.suffix= End with #### and the answer: a number", " End with #### and the answer: a number"),
        ("data.suffix=\n\nAnswer:", "\n\nAnswer:"),
        ("data.suffix= ", " "),
        ("data.suffix=", ""),
        ("data.suffix=' Box it.'", " Box it."),
        ('data.suffix="\\nBox it."', "\nBox it."),
        ("data.suffix=- a: b: [c", "- a: b: [c"),
    ],
)
def test_a_text_keeps_its_spaces_and_signs_and_quotes_are_yamls(override: str, suffix: str) -> None:
    assert apply_overrides(DataConfig(source="x.jsonl"), [override.removeprefix("data.")]).suffix == suffix
    config = dataclasses.replace(tiny(), data=DataConfig(source="x.jsonl"))
    assert apply_overrides(config, [override]).data.suffix == suffix


def test_a_text_that_may_be_null_still_can_be() -> None:
    with_prompt = DataConfig(source="x.jsonl", system_prompt="Think.")
    for text in ("null", "~", ""):
        assert apply_overrides(with_prompt, [f"system_prompt={text}"]).system_prompt is None
    assert apply_overrides(with_prompt, ["system_prompt='null'"]).system_prompt == "null"


@pytest.mark.parametrize(
    ("override", "wanted"),
    [
        ("gate.k=four", "an integer"),
        ("gate.k=2.5", "an integer"),
        ("gate.k=true", "an integer"),
        ("gate.k=null", "an integer"),
        ("gate.k=[1]", "an integer"),
        ("optimizer.lr=fast", "a number"),
        ("data.shuffle=maybe", "true or false"),
        ("student=null", "a text"),
        ("parallel.tensor=1.5", "an integer, or null"),
        ("gate=4", "its settings one by one, as in gate.metric=…, or null"),
        ("horizon={strategy: full}", "its settings one by one, as in horizon.strategy=…"),
    ],
)
def test_a_wrong_type_is_refused_with_key_value_and_type(override: str, wanted: str) -> None:
    key, _, value = override.partition("=")
    with pytest.raises(ConfigError) as error:
        apply_overrides(tiny(), [override])
    assert str(error.value) == f"{key} = {value!r} has the wrong type: give {wanted}"


@pytest.mark.parametrize("override", ["gate.k", "=3", "gate.k=[1", "name=${"])
def test_what_is_no_setting_is_refused(override: str) -> None:
    with pytest.raises(
        ConfigError, match=r"write it as dotted\.key=value|is not valid YAML|= '\${': nothing is put in for \${…}"
    ):
        apply_overrides(tiny(), [override])


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("optimizer.lr=1e-4", 1e-4),
        ("optimizer.lr='1E-4'", 1e-4),
        ("optimizer.lr=1", 1.0),
        ("gate.k='8'", 8),
        ("data.shuffle=yes", True),
        ("data.shuffle=0", False),
        ("name=2001-13-45", "2001-13-45"),
        ("name=[a]", "[a]"),
        ("name='null'", "null"),
        ("evaluation.sources=[a,12]", ("a", "12")),
        ("data.weights=[]", ()),
        ("parallel.tensor=null", None),
    ],
)
def test_a_value_is_read_as_what_it_is_asked_for(override: str, value: object) -> None:
    config: object = apply_overrides(tiny(), [override])
    for name in override.partition("=")[0].split("."):
        config = getattr(config, name)
    assert config == value and type(config) is type(value)


def test_a_value_that_the_dataclass_refuses_passes_through() -> None:
    with pytest.raises(ConfigError, match=r"^gate\.k = -4 is out of range: give a number at least 1$"):
        apply_overrides(tiny(), ["gate.k=-4"])


def test_the_last_of_two_overrides_counts() -> None:
    assert apply_overrides(tiny(), ["steps=5", "steps=7"]).steps == 7


# ---------------------------------------------------------------------------------------------------- config.yaml


@pytest.mark.parametrize("name", list_recipes())
def test_config_yaml_round_trips(name: str, tmp_path: Path) -> None:
    config = load_recipe(name)
    save_config(config, tmp_path / "new" / "config.yaml")
    assert load_config(tmp_path / "new" / "config.yaml") == config
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["config.yaml"]


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
