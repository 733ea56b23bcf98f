"""The prompts of the real pair: what is held out is in no training prompt, and the answers are right."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from scripts.real_pair import REQUESTS, Prompts, write_prompts

PARTS = ("train", "held_out")


def rows(folder: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prompts")
    write_prompts(folder, Prompts())
    return folder


def topic(row: dict[str, Any]) -> str:
    forms = [re.escape(request).replace(r"\{\}", "(.*)") for request in REQUESTS]
    (found,) = [match[1] for form in forms if (match := re.fullmatch(form, row["messages"][0]["content"]))]
    return found


def sum_of(row: dict[str, Any]) -> tuple[str, ...]:
    """The sign and the numbers, in any wording and order."""
    text = row["question"]
    signs = {"*": r"times|boxes", "-": r" - |gave", "+": r" \+ |gets"}
    (sign,) = [sign for sign, words in signs.items() if re.search(words, text)]
    return sign, *sorted(re.findall(r"\d+", text), key=int)


def test_no_topic_is_in_training_and_held_out_prompts(folder: Path) -> None:
    train, held_out = ({topic(row) for row in rows(folder, f"chat_{part}")} for part in PARTS)
    assert train and held_out and not train & held_out


def test_no_sum_is_in_training_and_held_out_problems(folder: Path) -> None:
    train, held_out = ({sum_of(row) for row in rows(folder, f"arithmetic_{part}")} for part in PARTS)
    assert train and held_out and not train & held_out


def test_the_answers_are_right(folder: Path) -> None:
    for part in PARTS:
        for row in rows(folder, f"arithmetic_{part}"):
            sign, small, large = sum_of(row)
            assert int(row["answer"]) == eval(f"{large} {sign} {small}"), row


def test_the_files_are_the_same_every_time(folder: Path, tmp_path: Path) -> None:
    write_prompts(tmp_path, Prompts())
    files = sorted(path.name for path in folder.iterdir())
    assert len(files) == 4 and all((tmp_path / name).read_bytes() == (folder / name).read_bytes() for name in files)
