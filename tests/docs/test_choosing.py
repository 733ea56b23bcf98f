"""docs/choosing.md recommends what the comparison shows (docs/second-start.md, kept runs), and names every rival."""

from __future__ import annotations

import re
from statistics import fmean
from typing import NamedTuple

import pytest

from benchmarks.common import mean_and_error
from benchmarks.strategies.kept import compared, read_kept, valid
from benchmarks.strategies.plan import METHODS, RIVALS
from benchmarks.studies.pair.rules import KINDS
from tests.docs.pages import ROOT, text

CHOOSING, COMPARISON = (text(ROOT / "docs" / name) for name in ("choosing.md", "second-start.md"))
# The comparison's method by what stands in the choice.
CHOSEN = {
    "`horizon.strategy=full`": "full",
    "`horizon.strategy=prune gate.w_base=0`": "prune_w0",
    "KAT with the pair's own threshold": "kat_window",
}
TITLES = {method.name: method.title for method in METHODS}
PAIRS = {"compatible": "tiny_compatible", "drift": "tiny_drift", "trap": "tiny_trap"}
KEPT_RUNS = valid(read_kept())
OF_PROBLEMS = 2.0  # points: what 512 problems alone do to the difference of two runs
HEADINGS = {"compatible": "The compatible pair", "drift": "The drift pair"}


class Shown(NamedTuple):
    """A method's points to full OPD, their standard error, and its tokens saved [%]."""

    points: float
    error: float
    saved: float


FULL = Shown(0, 0, 0)


def tables(page: str) -> list[list[dict[str, str]]]:
    """The tables of a page, their rows by the names of the columns."""
    found = []
    for block in re.findall(r"(?:^\|.*\n)+", page, re.M):
        head, _, *rows = ([cell.strip() for cell in line.strip("|\n").split("|")] for line in block.splitlines())
        found.append([dict(zip(head, row, strict=True)) for row in rows])
    return found


def shown(row: dict[str, str]) -> Shown:
    points, _, error = row["points"].replace("−", "-").partition(" ± ")
    return Shown(float(points), float(error or 0), float(row["tokens saved"].rstrip("% ")))


def in_points(row: dict[str, str]) -> dict[str, str]:
    return {**row, "points": row["points to full OPD"]}


def comparison_of(kind: str) -> dict[str, Shown]:
    """The pair's table with the differences seed by seed: title → numbers. Full OPD is what they differ from."""
    section = COMPARISON.split(f"## {HEADINGS[kind]}\n")[1].split("\n## ")[0]
    (table,) = (table for table in tables(section) if "points to full OPD" in table[0])
    name = next(iter(table[0]))
    found = {row[name]: shown(in_points(row)) for row in table if "±" in row["points to full OPD"]}
    return {TITLES["full"]: FULL, **found}


CHOICES = {row["the pair is"]: row for row in tables(CHOOSING)[0]}


def test_every_kind_of_pair_that_the_rules_know_has_a_row() -> None:
    assert set(CHOICES) == set(KINDS)


@pytest.mark.parametrize("kind", HEADINGS)
def test_a_choice_with_numbers_is_on_the_front_of_the_comparison(kind: str) -> None:
    row, others = CHOICES[kind], comparison_of(kind)
    mine = shown(in_points(row))
    assert others[TITLES[CHOSEN[row["take"]]]] == mine, "the page's numbers are the comparison's"
    assert mine.points + mine.error >= 0, "below full OPD by more than its error"
    for name, other in others.items():
        by_chance = other.error if mine == FULL else 0  # its points are the difference to the choice
        assert other.points - by_chance <= mine.points or other.saved <= mine.saved, name


@pytest.mark.parametrize("kind", PAIRS)
def test_no_kept_run_speaks_against_a_choice(kind: str) -> None:
    """No method has clearly more points, over the seeds that both have, and saves more tokens."""
    found = compared(KEPT_RUNS, PAIRS[kind])
    mine = found.get(CHOSEN[CHOICES[kind]["take"]], {})
    assert mine, f"no run of the choice for a pair of the kind {kind} is kept"
    for name, runs in found.items():
        both = sorted(set(runs) & set(mine))
        if both and fmean(runs[seed].tokens for seed in both) > fmean(mine[seed].tokens for seed in both):
            gap, error = mean_and_error([runs[seed].points - mine[seed].points for seed in both])
            assert gap <= 2 * max(error or 0.0, OF_PROBLEMS / len(both) ** 0.5), f"{name}: {gap:+.1f} points"


def test_a_choice_without_numbers_claims_none() -> None:
    for kind, row in CHOICES.items():
        assert (kind in HEADINGS) == bool(row["points to full OPD"]) == bool(row["tokens saved"])


def test_every_rival_is_named_and_nothing_else() -> None:
    named = {name for row in tables(CHOOSING)[1] for name in re.findall(r"`(\w+)`", row["`--methods`"])}
    assert named == {method.name for method in METHODS if method.group == RIVALS or method.name in ("replay", "random")}
