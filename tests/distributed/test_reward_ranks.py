"""Rank 0 scores for all: two ranks have its rewards, and its failure."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.distributed.ranks import run_ranks

WORKER = Path(__file__).with_name("worker_reward.py")


def test_both_ranks_have_rank_0s_rewards_and_its_failures(tmp_path: Path) -> None:
    run_ranks(WORKER, 2, [tmp_path])
    first, second = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2))
    assert first == second
    rewards, advantages = first["of_this_rank"]
    assert rewards == [1, 2, 3, 4]
    assert sum(advantages[:2]) == pytest.approx(0) and sum(advantages[2:]) == pytest.approx(0)
    assert "4 of 4 responses have failed" in first["raises"] and "ValueError: no reward for 1" in first["raises"]
    assert "SystemExit: 0" in first["ends"] and "mend the function" in first["ends"]
    assert "MemoryError: too many texts" in first["broken"]
