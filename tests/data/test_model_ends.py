"""Which ids end a response, read from a model's directory; and the directory of a student that learnt several."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from prune_opd.config import ObjectiveConfig
from prune_opd.data.ends import Ends, end_class, model_ends, terminal_ids, write_ends
from tests.fake_models import train_config

CHATML = (
    "{%- for message in messages %}{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}"
    "{%- endfor %}{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{%- endif %}"
)
SPECIAL = {"<|endoftext|>": 43, "<|im_start|>": 44, "<|im_end|>": 45, "<|eot|>": 46}


def model(directory: Path, **files: Any) -> Path:
    """A directory with a tokenizer.json and these files, by their names without .json."""
    added = [{"id": i, "content": name, "special": True} for name, i in SPECIAL.items()]
    directory.mkdir(parents=True)
    for name, value in {"tokenizer": {"added_tokens": added}, **files}.items():
        (directory / f"{name}.json").write_text(json.dumps(value))
    return directory


def test_a_base_model_and_a_chat_model_of_one_family_prefer_different_ends(tmp_path: Path) -> None:
    """The files of Qwen3-1.7B-Base and Qwen3-4B, with smaller ids."""
    base = model(
        tmp_path / "base",
        config={"eos_token_id": 43},
        generation_config={"eos_token_id": 43},
        tokenizer_config={"eos_token": "<|endoftext|>"},
    )
    chat = model(
        tmp_path / "chat",
        config={"eos_token_id": 45},
        generation_config={"eos_token_id": [45, 43]},
        tokenizer_config={"eos_token": {"content": "<|im_end|>"}},
    )
    assert model_ends(base) == Ends((43,), (43,), 43) and model_ends(chat) == Ends((43, 45), (43, 45), 45)
    config = train_config(base, chat)
    assert terminal_ids(config, 100) == (43, 45) and terminal_ids(config, 45) == (43,)
    assert end_class(config, 100) == ()
    assert end_class(train_config(base, chat, objective=ObjectiveConfig(k=16, ends="class")), 100) == (43, 45)


@pytest.mark.parametrize("place", ["tokenizer_config", "chat_template.jinja"])
def test_the_chat_template_ends_a_turn_with_one_more(tmp_path: Path, place: str) -> None:
    settings = {"eos_token": "<|endoftext|>"} | ({"chat_template": CHATML} if place == "tokenizer_config" else {})
    directory = model(tmp_path / "a", tokenizer_config=settings)
    assert model_ends(directory).ids == ((43, 45) if "chat_template" in settings else (43,))
    (directory / "chat_template.jinja").write_text(CHATML.replace("<|im_end|>", "<|eot|>"))
    assert model_ends(directory) == Ends((43, 46), (43,), 43)


@pytest.mark.parametrize("template", ["{{ raise_exception('no') }}", "{{ messages[0].content }}", "{% if", "no turn"])
def test_a_template_that_says_nothing_of_an_end_adds_none(tmp_path: Path, template: str) -> None:
    directory = model(tmp_path / "a", tokenizer_config={"eos_token": "<|eot|>", "chat_template": template})
    assert model_ends(directory) == Ends((46,), (46,), 46)


@pytest.mark.parametrize("broken", [None, [], "text", {"eos_token_id": None}, {"eos_token_id": [True, "x", -1]}])
def test_files_that_are_not_there_or_broken_say_nothing(tmp_path: Path, broken: Any) -> None:
    assert model_ends(tmp_path / "nowhere") == Ends((), (), None)
    directory = model(tmp_path / "a", config={"eos_token_id": 7}, generation_config=broken)
    assert model_ends(directory) == Ends((7,), (7,), 7)


def test_an_exported_student_ends_with_all_of_the_class(tmp_path: Path) -> None:
    directory = model(tmp_path / "a", config={"eos_token_id": 43})
    write_ends(directory, (43, 45))
    assert model_ends(directory) == Ends((43, 45), (43, 45), 43)
    (directory / "generation_config.json").write_text('{"eos_token_id": 45, "top_p": 0.8}')
    write_ends(directory, (43, 45))
    assert json.loads((directory / "generation_config.json").read_text()) == {"eos_token_id": [45, 43], "top_p": 0.8}
