"""Which rank sends which row of the teacher's hidden states to whom."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import pytest

from prune_opd import platform

platform.prepare()

from prune_opd.megatron.redistribute import find_routes, replica_of_row  # noqa: E402

DEALS = [[[[0, 3], [5]], [[1], [2, 4]]], [[[6], []], [[7], []]]]  # two updates, two replicas, two micro-batches each


@dataclass(frozen=True)
class Ranks:
    """A model's, as `ModelLayout` numbers them: TP neighbours, then replicas, then stages."""

    tp: int
    pp: int
    dp: int

    def last_stage_ranks(self, dp_rank: int) -> list[int]:
        first = ((self.pp - 1) * self.dp + dp_rank) * self.tp
        return list(range(first, first + self.tp))


RANKS: dict[str, Any] = {
    "tp4": Ranks(4, 1, 1),
    "tp2 pp2": Ranks(2, 2, 1),
    "tp2 dp2": Ranks(2, 1, 2),
    "pp2 dp2": Ranks(1, 2, 2),
}


def test_every_row_belongs_to_the_replica_that_it_was_dealt_to() -> None:
    assert replica_of_row(DEALS) == {0: 0, 3: 0, 5: 0, 1: 1, 2: 1, 4: 1, 6: 0, 7: 1}


@pytest.mark.parametrize("student", RANKS)
@pytest.mark.parametrize("teacher", RANKS)
def test_every_rank_that_needs_a_row_gets_it_once_from_a_rank_that_has_it(teacher: str, student: str) -> None:
    theirs, ours = RANKS[teacher], RANKS[student]
    has = {row: row % theirs.dp for row in range(8)}
    needs = {row: (row // 2) % ours.dp for row in range(8)}
    routes = find_routes(has, needs, theirs, ours)
    received = Counter((destination, row) for (_, destination), rows in routes.items() for row in rows)
    assert received == Counter((rank, row) for row in range(8) for rank in ours.last_stage_ranks(needs[row]))
    assert all(source in theirs.last_stage_ranks(has[row]) for (source, _), rows in routes.items() for row in rows)
    assert all(rows == sorted(rows) for rows in routes.values())


@pytest.mark.parametrize("place", RANKS)
def test_nothing_travels_between_equal_layouts_with_equal_deals(place: str) -> None:
    replica = {row: row % RANKS[place].dp for row in range(8)}
    routes = find_routes(replica, replica, RANKS[place], RANKS[place])
    assert all(source == destination for source, destination in routes)


def test_the_ranks_that_hold_a_row_share_the_sending() -> None:
    """From a teacher on ranks 0 and 1 to a student's last stage on ranks 2 and 3: one row each, not two from one."""
    routes = find_routes({0: 0}, {0: 0}, Ranks(2, 1, 1), RANKS["tp2 pp2"])
    assert routes == {(0, 2): [0], (1, 3): [0]}
