"""A teacher with experts over TP ranks gives one process's hidden states, and each rank routes its own tokens only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.distributed.ranks import read_ranks, run_ranks
from tests.distributed.tiny_run import made_up_rollouts, write_pair

WORKER = Path(__file__).with_name("worker_teacher_experts.py")
LAYERS = 3


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    models, out = tmp_path_factory.mktemp("models"), tmp_path_factory.mktemp("out")
    write_pair(models, family="qwen3_moe", num_hidden_layers=LAYERS)
    run_ranks(WORKER, 2, [models, out])
    return read_ranks(out, 2)


@pytest.mark.parametrize("expert", [1, 2])
def test_hidden_states_are_those_of_one_process(ranks: list[dict[str, Any]], expert: int) -> None:
    for rank in ranks:
        fp32, bf16 = rank[f"fp32 EP{expert}"], rank[f"bf16 EP{expert}"]
        assert fp32["rows"] > 0 and fp32["error"] < 1e-5
        # Each half of a sum over ranks is rounded before they are added, and so is a router's input: some choices flip.
        assert 0 < bf16["error"] < 3 * bf16["error of one process"] < 0.05


@pytest.mark.parametrize("expert", [1, 2])
def test_each_rank_routes_its_own_tokens(ranks: list[dict[str, Any]], expert: int) -> None:
    """Without sequence parallelism both ranks would send every token of the batch to the experts."""
    tokens = sum(made_up_rollouts().row_length_B)
    routed = [rank[f"fp32 EP{expert}"]["routed"] for rank in ranks]
    assert all(rank[f"fp32 EP{expert}"]["cut"] and rank[f"fp32 EP{expert}"]["multiple"] == 2 for rank in ranks)
    assert len(set(routed)) == 1
    assert LAYERS * tokens <= sum(routed) < LAYERS * (tokens + 30), "all of them once, and a few that fill up"


def test_a_teacher_that_is_not_cut_has_none(ranks: list[dict[str, Any]]) -> None:
    assert not any(rank["alone"]["cut"] for rank in ranks)
