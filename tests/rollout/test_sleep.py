"""An engine that has slept generates as before once it is awake and loaded, though nothing that it had was kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.rollout.one_rank import run_worker
from tests.rollout.worker_sleep import ROUNDS

WORKER = Path(__file__).with_name("worker_sleep.py")


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run_worker(WORKER, tmp_path_factory.mktemp("sleep"), "sleep.json")


def test_every_round_of_sleep_wake_load_wake_generates_the_same(results: dict[str, Any]) -> None:
    assert len(results["rounds"]) == ROUNDS
    for found in results["rounds"]:
        assert found["after"] == results["before"]
        assert found["holds while asleep"] is False, "after level 2 the weights are gone"


def test_without_a_load_it_would_not(results: dict[str, Any]) -> None:
    assert results["without a load"] != results["before"]


def test_an_engine_that_sleeps_is_woken_before_it_ends(results: dict[str, Any]) -> None:
    assert results["woken by the close"] == [["kv_cache", "weights"]]
