"""The tables that the docs take from the code are on their pages, and nothing in them is left without a meaning."""

from __future__ import annotations

import inspect

import pytest

from prune_opd.config import ParallelConfig, SftConfig, TrainConfig
from prune_opd.config.describe import field_comments, settings
from scripts.docs_tables import TABLE, TABLES, on_page_markdown, settings_tables
from tests.docs.pages import DOCS, ROOT, text


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


def test_a_type_says_its_range_and_its_choices() -> None:
    types = {one.name: one.type for one in settings(ParallelConfig)}
    assert types["tensor"] == "integer at least 1 or null" and types["recompute"] == "none, selective, full"
    assert types["timeout_minutes"] == "number above 0" and types["sequence_parallel"] == "true, false"


def test_every_table_has_its_place_on_a_page_and_the_site_fills_it() -> None:
    written = [page.read_text(encoding="utf-8") for page in DOCS]
    assert sorted(name for page in written for name in TABLE.findall(page)) == sorted(TABLES)
    for page in written:
        for name in TABLE.findall(page):
            assert TABLES[name]() in on_page_markdown(page, page=None, config=None, files=None)
    assert "scripts/docs_tables.py" in text(ROOT / "mkdocs.yml")
