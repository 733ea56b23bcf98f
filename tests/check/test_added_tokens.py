"""Tokens that only the files beside tokenizer.json name: `check` gives them the ids that transformers gives them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from prune_opd.check.tokenizer import _all_tokens, tokenizer_problems
from prune_opd.data.tokenizer import load_tokenizer
from tests.fake_models import write_model

TOKEN = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False, "special": True}
THINK, OTHER = TOKEN | {"content": "<think>"}, TOKEN | {"content": "<x>"}
MAP, ADDED = "special_tokens_map.json", "added_tokens.json"

# name → tokenizer_config.json, and the other files
VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "nothing": ({}, {}),
    "decoder, the next id": ({"added_tokens_decoder": {"258": THINK}}, {}),
    "decoder, an id further on": ({"added_tokens_decoder": {"262": THINK}}, {}),
    "decoder, an id that is taken": ({"added_tokens_decoder": {"3": THINK}}, {}),
    "decoder, two in another order": ({"added_tokens_decoder": {"300": THINK, "290": OTHER}}, {}),
    "decoder and a named token": ({"pad_token": "<p>", "added_tokens_decoder": {"300": THINK}}, {ADDED: {"<z>": 258}}),
    "map, list": ({}, {MAP: {"additional_special_tokens": ["<think>"]}}),
    "map, named": ({}, {MAP: {"eos_token": "<think>"}}),
    "map, object": ({}, {MAP: {"pad_token": THINK}}),
    "map beside a decoder": ({"added_tokens_decoder": {"258": THINK}}, {MAP: {"additional_special_tokens": ["<z>"]}}),
    "map and config, lists": ({"extra_special_tokens": ["<a>"]}, {MAP: {"extra_special_tokens": ["<b>"]}}),
    "map and config, old list": ({"extra_special_tokens": ["<a>"]}, {MAP: {"additional_special_tokens": ["<b>"]}}),
    "extra, list": ({"extra_special_tokens": ["<think>"]}, {}),
    "extra, named": ({"extra_special_tokens": {"image_token": "<think>"}}, {}),
    "additional": ({"additional_special_tokens": ["<think>"]}, {}),
    "additional and extra": ({"additional_special_tokens": ["<a>"], "extra_special_tokens": ["<b>"]}, {}),
    "model's own": ({"image_token": "<think>"}, {}),
    "model's own, listed": ({"model_specific_special_tokens": {"image_token": "<think>"}}, {}),
    "model's own, both": ({"image_token": "<i>", "model_specific_special_tokens": {"x_token": "<think>"}}, {}),
    "order": (
        {"image_token": "<i>", "pad_token": "<p>", "bos_token": "<b>", "extra_special_tokens": ["<e>", "<f>"]},
        {},
    ),
    "order, named": ({"image_token": "<i>", "eos_token": "<b>", "extra_special_tokens": {"a": "<e>", "b": "<f>"}}, {}),
    "added_tokens.json": ({}, {ADDED: {"<a>": 400, "<b>": 300}}),
}


def write(directory: Path, settings: dict[str, Any], beside: dict[str, Any]) -> Path:
    """A byte-level tokenizer of 256 letters and two special tokens, with these files beside it."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    write_model(directory)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in ("<|im_start|>", "<|im_end|>")])
    tokenizer.save(str(directory / "tokenizer.json"))
    files = {"tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast"} | settings} | beside
    for name, content in files.items():
        (directory / name).write_text(json.dumps(content), encoding="utf-8")
    return directory


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_token_has_the_id_that_transformers_gives_it(variant: str, tmp_path: Path) -> None:
    directory = write(tmp_path / "model", *VARIANTS[variant])
    vocabulary = load_tokenizer(directory).get_vocab()  # type: ignore[attr-defined]
    found = _all_tokens(json.loads((directory / "tokenizer.json").read_bytes()), directory)
    assert found == {i: token for token, i in vocabulary.items()}
    plain = write(tmp_path / "plain", {}, {})
    assert bool(tokenizer_problems(directory, plain)) == (variant != "nothing")


def test_a_number_that_no_token_gets_does_not_hide_a_difference(tmp_path: Path) -> None:
    """Both files say 262; of the student's transformers makes 258, the teacher's has it in its tokenizer.json."""
    student = write(tmp_path / "student", {"added_tokens_decoder": {"262": THINK}}, {})
    teacher = write(tmp_path / "teacher", {}, {})
    file = json.loads((teacher / "tokenizer.json").read_bytes())
    file["added_tokens"].append(THINK | {"id": 262})
    (teacher / "tokenizer.json").write_text(json.dumps(file), encoding="utf-8")
    (problem,) = tokenizer_problems(student, teacher)
    assert "id 258 is '<think>' for the student and unused for the teacher" in problem
