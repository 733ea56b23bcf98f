"""One run of the comparison: windows that are replayed, limits around them, fewer problems between."""

from __future__ import annotations

import json
from typing import Any, cast

import pytest

from benchmarks.strategies.rank import FewerBetween, Replay, scattered
from prune_opd.config import HorizonConfig
from prune_opd.eval.evaluate import Evaluator


def replaying(*windows: int) -> Replay:
    return Replay(HorizonConfig(strategy="full", max_len=100, min_len=1), windows)


def test_replay_gives_the_windows_in_their_order_and_keeps_the_last() -> None:
    controller, seen = replaying(30, 50, 400), []
    for _ in range(4):
        seen.append(controller.horizon)
        controller.update([1], [2], [True])
    assert seen == [30, 50, 100, 100]


def test_a_restored_replay_goes_on_where_it_was() -> None:
    first, second = replaying(30, 50, 70), replaying(30, 50, 70)
    first.update([], [], [])
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert second.horizon == 50


def test_scattered_limits_have_the_horizon_as_their_mean_and_stay_between_one_and_max_len() -> None:
    draw = scattered(max_len=100, seed=0)
    for horizon, low, high in ((30, 1, 59), (80, 60, 100), (100, 100, 100), (1, 1, 1)):
        limits = draw(horizon, 20_000, 1)
        assert (min(limits), max(limits)) == (low, high)
        assert sum(limits) / len(limits) == pytest.approx(horizon, abs=0.5)


def test_scattered_limits_are_the_same_for_the_same_seed_and_step_only() -> None:
    first = scattered(100, seed=3)(50, 32, 7)
    assert first == scattered(100, seed=3)(50, 32, 7)
    assert first != scattered(100, seed=3)(50, 32, 8)
    assert first != scattered(100, seed=4)(50, 32, 7)


def test_only_the_last_evaluation_takes_all_problems(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Evaluator, "run", lambda self, engine: len(self.problems))
    whole = Evaluator(None, "t", cast(Any, None), cast(Any, range(8)), cast(Any, None))
    steps = iter([False, False, True])
    evaluator = FewerBetween(whole, 3, lambda: next(steps))
    assert [evaluator.run(cast(Any, None)) for _ in range(3)] == [3, 3, 8]
