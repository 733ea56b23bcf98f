"""Overrides of the command line: what was typed is what is set, and a mistake is answered with what would be right."""

from __future__ import annotations

import dataclasses
import re

import pytest

from prune_opd.config import CorpusConfig, DataConfig, SftConfig, SftStage, TrainConfig
from prune_opd.config.overrides import SYMBOLS, apply_overrides, dotted_keys
from prune_opd.config.recipe import load_recipe
from prune_opd.config.yaml import config_differences
from prune_opd.errors import ConfigError


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
    assert (
        re.sub(r" \(the papers' \w+\)", "", str(error.value)) == f"there is no setting {key!r}: did you mean {nearest}?"
    )


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
