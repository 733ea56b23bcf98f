"""Which rank sends which row of the teacher's hidden states to whom."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass
from typing import Any

import pytest

from prune_opd import platform
from prune_opd.config import TrainConfig
from prune_opd.config.memory_phases import EXCHANGE_BYTES
from prune_opd.config.overrides import apply_overrides
from prune_opd.config.recipe import load_recipe
from prune_opd.plan.memory import hidden_bytes
from prune_opd.plan.setting import setting_of

platform.prepare()

from prune_opd.megatron.redistribute import Routes, find_routes, in_rounds, replica_of_row, sources_of_row  # noqa: E402
from prune_opd.rollout.balance import deal, deal_any  # noqa: E402

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


LENGTHS = [30 + 7 * row % 11 for row in range(8)]


def holders(replica_of: dict[int, int], teacher: Any) -> dict[int, list[int]]:
    return {row: teacher.last_stage_ranks(replica) for row, replica in replica_of.items()}


@pytest.mark.parametrize("student", RANKS)
@pytest.mark.parametrize("teacher", RANKS)
def test_every_rank_that_needs_a_row_gets_it_once_from_a_rank_that_has_it(teacher: str, student: str) -> None:
    theirs, ours = RANKS[teacher], RANKS[student]
    has = {row: row % theirs.dp for row in range(8)}
    needs = {row: (row // 2) % ours.dp for row in range(8)}
    routes = find_routes(holders(has, theirs), needs, ours, LENGTHS)
    received = Counter((destination, row) for (_, destination), rows in routes.items() for row in rows)
    assert received == Counter((rank, row) for row in range(8) for rank in ours.last_stage_ranks(needs[row]))
    assert all(source in theirs.last_stage_ranks(has[row]) for (source, _), rows in routes.items() for row in rows)
    assert all(rows == sorted(rows) for rows in routes.values())


@pytest.mark.parametrize("place", RANKS)
def test_nothing_travels_between_equal_layouts_with_equal_deals(place: str) -> None:
    replica = {row: row % RANKS[place].dp for row in range(8)}
    routes = find_routes(holders(replica, RANKS[place]), replica, RANKS[place], LENGTHS)
    assert all(source == destination for source, destination in routes)
    assert in_rounds(routes, LENGTHS, 1) == []


def test_a_rank_sends_to_itself_through_no_exchange() -> None:
    """Rank 0 has both rows and trains on them with rank 1, which has none: only the other's copies travel."""
    routes = find_routes({0: [0], 1: [0]}, {0: 0, 1: 0}, RANKS["tp2 dp2"], [5, 6])
    assert routes == {(0, 0): [0, 1], (0, 1): [0, 1]}
    assert in_rounds(routes, [5, 6], 100) == [{(0, 1): [0, 1]}]


def test_a_round_holds_what_a_rank_may_send_at_once_and_every_row_travels_once() -> None:
    routes = find_routes({row: [0, 1] for row in range(8)}, {row: 0 for row in range(8)}, RANKS["tp2 pp2"], LENGTHS)
    rounds = in_rounds(routes, LENGTHS, 80)
    assert len(rounds) > 2
    for part in rounds:
        of_source = Counter({source: 0 for source, _ in part})
        for (source, _), rows in part.items():
            of_source[source] += sum(LENGTHS[row] for row in rows)
        assert max(of_source.values()) <= 80
    again: Routes = {}
    for part in rounds:
        for route, rows in part.items():
            again.setdefault(route, []).extend(rows)
    assert again == routes
    assert [len(rows) for part in in_rounds(routes, LENGTHS, 1) for rows in part.values()] == [1] * 16, "a larger row"


# ---------------------------------------------------------------------------------------------------- at full size


def at_full_size(student: Ranks, teacher: Ranks, rows: int, mean: int) -> dict[str, list[int]]:
    """Tokens by rank: held by the teacher's ranks, sent to others, received from others or from itself."""
    lengths = [max(64, min(12288, int(random.Random(row).gauss(mean, mean / 3)))) for row in range(rows)]
    totals = [length + 300 for length in lengths]
    ours = [deal(totals, range(rows), student.dp, 16384)]
    theirs = ours if teacher.dp == student.dp else [deal_any(totals, list(range(rows)), teacher.dp, 16384)]
    routes = find_routes(holders(replica_of_row(theirs), teacher), replica_of_row(ours), student, lengths)  # type: ignore[arg-type]
    ranks = range(student.tp * student.pp * student.dp)
    sent, received, held = Counter[int](), Counter[int](), Counter[int]()
    for (source, destination), of_route in routes.items():
        tokens = sum(lengths[row] for row in of_route)
        received[destination] += tokens
        sent[source] += tokens * (source != destination)
    for row, sources in sources_of_row(routes).items():
        for rank in sources:
            held[rank] += lengths[row]
    of_all = {"held": held, "sent": sent, "received": received}
    return {what: [tokens[rank] for rank in ranks] for what, tokens in of_all.items()} | {"all": [sum(lengths)]}


def test_all_ranks_of_a_wide_teacher_share_the_sending_and_the_holding() -> None:
    """Qwen3-8B on two GPUs from Qwen3-32B on eight, 32 GPUs. Before, ranks 0 and 1 of 8 sent everything: 15.1 GB each.

    And all eight held every row of their replica, 19.7 GB.
    """
    found = at_full_size(Ranks(2, 1, 16), Ranks(8, 1, 4), 1024, 7500)
    share = found["all"][0] / 32
    gigabytes = 5120 * 2 / 1e9
    assert max(found["sent"]) < 1.15 * min(found["sent"])
    assert max(found["sent"]) * gigabytes < 5.0
    assert max(found["held"]) < 1.6 * share, "what it sends, and the rows that it trains on itself"
    assert max(found["held"]) * gigabytes < 4.0


def test_a_teacher_that_lies_like_the_student_sends_nothing() -> None:
    found = at_full_size(Ranks(4, 1, 32), Ranks(4, 1, 32), 2048, 7500)
    assert max(found["sent"]) == 0
    assert found["held"] == found["received"]


def test_the_planner_knows_what_a_rank_holds_and_receives() -> None:
    """Not less than the routes of made-up lengths need, and not a quarter more than they and the exchange's copy."""
    config = load_recipe("qwen3_8b_from_32b_32xh100_fp8")
    assert isinstance(config, TrainConfig)
    setting = setting_of(config, "h100", 4)
    found = at_full_size(Ranks(2, 1, 16), Ranks(8, 1, 4), setting.responses, 7500)
    each = setting.teacher.hidden * setting.weight_bytes
    sent, trained_on = hidden_bytes(setting, found["all"][0], 0.0)
    assert trained_on == pytest.approx(max(found["received"]) * each, rel=0.02)
    most = max(held + received for held, received in zip(found["held"], found["received"], strict=True)) * each
    assert 0.9 * most < sent + trained_on + EXCHANGE_BYTES < 1.25 * most + EXCHANGE_BYTES
    alike = setting_of(apply_overrides(config, ["parallel.teacher_tensor=2"]), "h100", 4)
    assert hidden_bytes(alike, found["all"][0], 0.0) == (trained_on, trained_on)  # the same ones
