"""A dispatcher of experts forgets the routing of its tokens after each layer, and the backward pass does not notice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.distributed.ranks import read_ranks, run_ranks
from tests.distributed.tiny_run import write_pair
from tests.distributed.worker_routing import DTYPES

WORKER = Path(__file__).with_name("worker_routing.py")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    models, out = tmp_path_factory.mktemp("models"), tmp_path_factory.mktemp("out")
    write_pair(models, family="qwen3_moe", num_hidden_layers=2)
    run_ranks(WORKER, 2, [models, out], timeout=400)
    return read_ranks(out, 2)


@pytest.mark.parametrize("dtype", DTYPES)
def test_nothing_of_the_routing_is_left_after_a_step(ranks: list[dict[str, Any]], dtype: str) -> None:
    for rank in ranks:
        assert rank[dtype]["held"] > 0, "what megatron-core keeps by itself"
        assert rank[dtype]["left"] == 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_are_those_of_kept_routing_bit_by_bit(ranks: list[dict[str, Any]], dtype: str) -> None:
    for rank in ranks:
        assert rank[dtype]["gradients"] > 1 and rank[dtype]["largest"] > 0
        assert rank[dtype]["same gradients"] and rank[dtype]["same step"]
