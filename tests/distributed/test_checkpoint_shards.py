"""A periodic checkpoint is written as the ranks hold it: nothing is gathered, and a resumed run is the unbroken one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.distributed.ranks import read_ranks, run_ranks
from tests.distributed.tiny_run import write_pair
from tests.distributed.worker_checkpoint_shards import CASES, FORMATS

WORKER = Path(__file__).with_name("worker_checkpoint_shards.py")
EVERY = [(model, form) for model in CASES for form in FORMATS]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    models, out = tmp_path_factory.mktemp("models"), tmp_path_factory.mktemp("out")
    write_pair(models / "dense", num_hidden_layers=2)
    write_pair(models / "moe", family="qwen3_moe", num_hidden_layers=2)
    run_ranks(WORKER, 2, [models, out], timeout=400)
    return read_ranks(out, 2)


@pytest.mark.parametrize("model", CASES)
def test_nothing_is_gathered_for_a_checkpoint_of_this_layout(ranks: list[dict[str, Any]], model: str) -> None:
    for rank in ranks:
        found, before = rank[model]["as held"], rank[model]["any layout"]
        assert before["received"] > 1.4 * before["held"], "the state of both replicas, but for experts, which have one"
        assert before["new"] > 1.4 * before["held"]
        assert found["received"] == 0
        assert found["new"] < 0.02 * found["held"], "what fills up the ends of a buffer"


@pytest.mark.parametrize(("model", "form"), EVERY)
def test_a_resumed_run_is_the_unbroken_one_bit_by_bit(ranks: list[dict[str, Any]], model: str, form: str) -> None:
    for rank in ranks:
        found = rank[model][form]
        assert found["loaded bit by bit"] and found["same step"] and found["same weights"]


@pytest.mark.parametrize(("model", "form"), EVERY)
def test_the_replicas_share_the_writing(ranks: list[dict[str, Any]], model: str, form: str) -> None:
    first, second = ranks[0][model][form]["written"]
    assert 0.6 < first / second < 1.7


@pytest.mark.parametrize(("model", "form"), EVERY)
def test_a_rehearsal_plans_what_each_rank_writes(ranks: list[dict[str, Any]], model: str, form: str) -> None:
    """Without the other rank there: the bytes are those that the two agree on.

    As held up to a few numbers: the other's share of the optimizer is taken to be as large as one's own.
    """
    near = 0 if form == "any layout" else 0.002
    for rank in ranks:
        assert rank[model][form]["dealt"] > 0
        assert rank[model][form]["planned"] == pytest.approx(rank[model][form]["dealt"], rel=near)


@pytest.mark.parametrize(("model", "form"), EVERY)
def test_the_replicas_share_the_reading(ranks: list[dict[str, Any]], model: str, form: str) -> None:
    """What both want is read once; without sharing, each reads all that it wants."""
    read, alone = (sum(rank[model][form][name] for rank in ranks) for name in ("read", "read alone"))
    assert read < 0.95 * alone
    if model == "dense":  # both want all weights, and for any layout all of the optimizer's state
        shared = ranks[0][model]["as held"]["weights"] if form == "as held" else alone / 2
        assert 0.99 * shared <= alone - read <= 1.1 * shared  # each tensor of these tiny ones has a header in the file
        assert all(0.4 < rank[model][form]["read"] / read < 0.6 for rank in ranks)


def test_another_layout_loads_it_or_is_told_why_not(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert rank["dense"]["any layout"]["in another layout"] == ""
        said = rank["dense"]["as held"]["in another layout"]
        assert "parallel.tensor = 1, parallel.pipeline = 1" in said and "this run has parallel.tensor = 2" in said
        assert "checkpoint.any_layout=always" in said
