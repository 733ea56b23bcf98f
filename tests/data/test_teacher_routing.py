"""Which teacher a prompt has, and the rows that have none."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from prune_opd.config import DataConfig, TeacherConfig, TrainConfig
from prune_opd.config.recipe import load_recipe
from prune_opd.data.prompts import make_sampler, reference_texts
from prune_opd.data.routing import make_route
from prune_opd.data.tokenizer import load_tokenizer
from prune_opd.errors import ConfigError

SORTING = "reasoning_gym/number_sorting?min_numbers=3&max_numbers=5"
BOOKS, LISTS = TeacherConfig("books", ("ledger", "accounts")), TeacherConfig("lists", (SORTING, "other"))


def config_of(**data: Any) -> TrainConfig:
    one = load_recipe("tiny_compatible")
    assert isinstance(one, TrainConfig)
    return dataclasses.replace(
        one, teacher="", teachers={"books": BOOKS, "lists": LISTS}, data=dataclasses.replace(one.data, **data)
    )


def sampler_of(config: TrainConfig) -> Any:
    return make_sampler(config.data, load_tokenizer(config.student), 0, 96, route=make_route(config))


def write(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps({"prompt": "<bos> 4 <ask>", "answer": "4", **row}) + "\n" for row in rows))
    return path


def test_tasks_have_the_teacher_of_their_source() -> None:
    drawn = sampler_of(config_of(mixture=("ledger", SORTING))).next(8)
    assert [(p.source, p.teacher) for p in drawn] == [("ledger", "books"), (SORTING, "lists")] * 4


def test_a_row_has_the_teacher_of_its_column_or_its_source_or_its_file(tmp_path: Path) -> None:
    rows = [{"who": "lists", "source": "accounts"}, {"source": "accounts"}, {"source": "other", "who": None}, {}]
    path = write(tmp_path / "ledger.jsonl", *rows)
    drawn = sampler_of(config_of(source=str(path), shuffle=False, teacher_column="who")).next(4)
    assert [p.teacher for p in drawn] == ["lists", "books", "lists", "books"]
    drawn = sampler_of(config_of(source=str(path), shuffle=False)).next(4)
    assert [p.teacher for p in drawn] == ["books", "books", "lists", "books"]


def test_rows_without_a_teacher_are_named_before_anything_is_built(tmp_path: Path) -> None:
    path = write(tmp_path / "mixed.jsonl", {"source": "accounts"}, {"source": "poems"}, {"source": "poems"})
    with pytest.raises(ConfigError, match=r"mixed\.jsonl:2: no teacher has the source 'poems'.*in 2 of 3 rows"):
        sampler_of(config_of(source=str(path)))
    path = write(tmp_path / "named.jsonl", {"who": "nobody"})
    with pytest.raises(ConfigError, match=r"named\.jsonl:1: who = 'nobody' is no teacher: give one of books, lists"):
        sampler_of(config_of(source=str(path), teacher_column="who"))
    path = write(tmp_path / "number.jsonl", {"who": 3})
    with pytest.raises(ConfigError, match=r'number\.jsonl:1: "who" = 3'):
        sampler_of(config_of(source=str(path), teacher_column="who"))


def test_one_teacher_gives_no_names(tmp_path: Path) -> None:
    one = load_recipe("tiny_compatible")
    assert isinstance(one, TrainConfig) and make_route(one) is None
    assert {p.teacher for p in make_sampler(DataConfig(), load_tokenizer(one.student), 0).next(3)} == {""}


def test_a_teacher_is_tested_on_what_it_teaches() -> None:
    sampler = sampler_of(config_of(mixture=("ledger", SORTING)))
    name, texts = reference_texts(sampler, 3, "lists")
    assert name == SORTING and len(texts) == 3
    assert reference_texts(sampler, 3, "books")[0] == "ledger"
