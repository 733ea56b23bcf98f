"""The tables that the docs take from the code are up to date, and nothing in them is left without a meaning."""

from __future__ import annotations

import inspect

import pytest

from prune_opd.config import ParallelConfig, SftConfig, TrainConfig
from scripts.docs_tables import TABLE, TABLES, field_comments, filled, settings, settings_tables
from tests.docs.pages import DOCS, text


def parts(config: type) -> dict[str, type]:
    below = [part for one in settings(config) if one.part for part in parts(one.part).items()]
    return {config.__name__: config, **dict(below)}


PARTS = {**parts(TrainConfig), **parts(SftConfig)}


@pytest.mark.parametrize("name", PARTS)
def test_every_setting_has_a_meaning(name: str) -> None:
    assert not [one.name for one in settings(PARTS[name]) if one.part is None and not one.meaning]
    about = inspect.getdoc(PARTS[name]) or ""
    assert about and not about.startswith(f"{name}("), "dataclasses make up a docstring where there is none"


def test_every_setting_is_in_the_table() -> None:
    table = settings_tables()
    assert len(PARTS) > 20
    for part in PARTS.values():
        for one in settings(part):
            assert one.part or f"{one.name}` |" in table, one.name


def test_a_comment_belongs_to_the_field_it_is_beside_or_above() -> None:
    comments = field_comments(ParallelConfig)
    assert comments["pipeline"] == "stages" and comments["context"] == "ranks that share a sequence"
    assert field_comments(TrainConfig)["stop_after"].startswith("save and stop after this step")


def test_pages_have_their_tables_as_the_code_has_them_now() -> None:
    found = [name for page in DOCS for _, name, _ in TABLE.findall(text(page))]
    assert sorted(found) == sorted(TABLES)
    stale = [page.name for page in DOCS if filled(text(page)) != text(page)]
    assert not stale, f"run `make docs-tables`: {stale} are not up to date"
