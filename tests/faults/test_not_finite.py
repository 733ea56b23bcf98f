"""A loss, logits or a gradient that is not finite on one rank only, where the ranks share one model (TP 2, PP 2).

Two data-parallel ranks are in test_trouble.py.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.ranks import run_ranks
from tests.distributed.tiny_run import write_pair

WORKER = Path(__file__).with_name("worker_not_finite.py")


@pytest.fixture(scope="module", params=[(2, 1), (1, 2)], ids=["TP2", "PP2"])
def of_ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("not_finite")
    write_pair(folder)
    run_ranks(WORKER, 2, [folder, folder, *map(str, request.param)], timeout=90)
    found: list[dict[str, Any]] = json.loads((folder / "results.json").read_text())
    return found


@pytest.mark.parametrize("what", ["loss", "logits", "gradient"])
def test_the_update_is_left_out_on_every_rank_and_the_next_one_is_made(
    of_ranks: list[dict[str, Any]], what: str
) -> None:
    for found in of_ranks:
        assert found[what] == {"updates": [0, 1], "same": True, "moved": True, "finite": True}


def test_rank_and_batch_are_named_and_too_many_in_a_row_end_all_ranks(of_ranks: list[dict[str, Any]]) -> None:
    for found in of_ranks:
        assert all("not finite on rank " in line and "(batch rows " in line for line in found["notes"])
        assert "That is 2 in a row, survival.max_skipped allows no more" in found["stopped"]
        assert "the loss is not finite on rank 1 (batch rows " in found["stopped"]
