"""The page of the objectives has a row for each, with its own settings, and names nothing that does not exist."""

from __future__ import annotations

import re

import pytest

from prune_opd.config import ObjectiveConfig
from prune_opd.config.method import _OWNERS, OBJECTIVES
from tests.docs.pages import ROOT, text

PAGE = text(ROOT / "docs" / "objectives.md")
ROWS = {
    row.split("`")[1]: row.split("|")[3]
    for row in PAGE.partition("## All of them")[2].partition("\n## ")[0].splitlines()
    if row.startswith("| `") and not row.startswith("| `objective.name`")
}


def test_every_objective_has_its_row() -> None:
    assert list(ROWS) == list(OBJECTIVES)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_row_names_the_settings_that_the_objective_has(name: str) -> None:
    assert set(re.findall(r"`(\w+)`", ROWS[name])) == {setting for setting, owners in _OWNERS.items() if name in owners}
    for setting in _OWNERS:
        assert setting in ObjectiveConfig.__dataclass_fields__
