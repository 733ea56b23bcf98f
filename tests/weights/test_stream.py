"""The resharding stream: in every layout every rank receives every Hugging Face tensor, bit by bit, in two buckets."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.ranks import run_ranks
from tests.models import write_model
from tests.weights.worker_stream import BUCKETS_MB, DRIFTS, LAYOUTS, TRANSPORTS

WORKER = Path(__file__).with_name("worker_stream.py")
MODELS = {"qwen3 tied": ("qwen3", True), "qwen2 untied": ("qwen2", False), "qwen3 moe": ("qwen3_moe", False)}

Cases = list[dict[str, Any]]  # of every rank


@pytest.fixture(scope="module")
def layouts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Cases]:
    models, out = tmp_path_factory.mktemp("models"), tmp_path_factory.mktemp("out")
    for name, (family, tied) in MODELS.items():
        write_model(models / name, family, tied=tied, num_hidden_layers=4)
    results = {}
    for ranks, names in LAYOUTS.items():
        run_ranks(WORKER, ranks, [models, out], timeout=180)
        for layout in names:
            results[layout] = json.loads((out / f"{layout}.json").read_text())
            assert len(results[layout]) == ranks
    return results


@pytest.fixture(params=[name for names in LAYOUTS.values() for name in names])
def cases(request: pytest.FixtureRequest, layouts: dict[str, Cases]) -> Cases:
    return layouts[request.param]


def streams(cases: Cases) -> list[tuple[str, dict[str, Any]]]:
    """Of every rank, model, transport and bucket size."""
    found = [(name, case) for rank in cases for name, case in rank.items() if name.endswith("MB")]
    assert len(found) == len(cases) * len(models_of(cases)) * len(TRANSPORTS) * len(BUCKETS_MB)
    return found


def followed_up(cases: Cases) -> list[tuple[str, dict[str, Any]]]:
    found = [(name, case) for name, case in streams(cases) if "wrong after an update" in case]
    assert len(found) == len(cases) * len(models_of(cases)) * len(TRANSPORTS)
    return found


def models_of(cases: Cases) -> set[str]:
    names = {name.split(",")[0] for name in cases[0]}
    assert names in ({"qwen3 tied", "qwen2 untied"}, {"qwen2 untied"}, {"qwen3 moe"})
    return names


def test_every_rank_receives_every_tensor_of_the_directory_bit_by_bit(cases: Cases) -> None:
    for name, case in streams(cases):
        assert case["wrong"] == [], name


def test_the_buckets_are_as_many_as_their_size_asks_for(cases: Cases) -> None:
    for rank, model, transport in product(cases, models_of(cases), TRANSPORTS):
        small, medium, large = (rank[f"{model}, {transport}, {size} MB"]["buckets"] for size in BUCKETS_MB)
        assert small > medium >= large == 1


def test_a_stream_after_an_update_brings_the_new_weights(cases: Cases) -> None:
    for name, case in followed_up(cases):
        assert case["wrong after an update"] == [], name


def test_two_buckets_exist_at_a_time(cases: Cases) -> None:
    """For a consumer that has always let go of all tensors but one, and for one like vLLM, which keeps a few.

    Not at the smallest size: a tensor larger than a bucket has a buffer of its own, which is not kept.
    """
    for name, case in streams(cases):
        assert case["buffers"] <= 2 or name.endswith(f", {BUCKETS_MB[0]} MB"), name
    for name, case in followed_up(cases):
        assert case["buffers of one that keeps a few"] <= 2, name


def test_a_tensor_that_the_consumer_keeps_is_not_overwritten(cases: Cases) -> None:
    for name, case in followed_up(cases):
        assert case["wrong when kept"] == [], name


def test_streaming_leaves_the_parameters_alone(cases: Cases) -> None:
    for name, case in streams(cases):
        assert case["changed parameters"] == 0, name


def test_a_tensor_that_changes_on_its_way_is_named_on_every_rank(cases: Cases, request: pytest.FixtureRequest) -> None:
    errors = [(name, error) for rank in cases for name, error in rank.items() if name.endswith("corrupted")]
    alone = request.node.callspec.params["cases"] == "dp2"  # every rank has the whole model: nothing travels
    assert len(errors) == (0 if alone else len(cases) * len(models_of(cases)) * len(TRANSPORTS))
    for name, error in errors:
        tensor, _, reason = error.partition(": ")
        assert reason.startswith(f"weight sync: {tensor!r} is not on every rank what was sent"), name


@pytest.mark.parametrize("cases", DRIFTS, indirect=True)
def test_a_replica_that_has_drifted_is_named_and_left_as_it_is(cases: Cases) -> None:
    found = [(name, case) for rank in cases for name, case in rank.items() if name.endswith("drifted")]
    assert len(found) == len(cases) * len(models_of(cases)) * len(TRANSPORTS)
    for name, case in found:
        assert case["error"].startswith(f"weight sync: {case['tensor']!r} is not on every rank what was sent"), name
        assert case["untouched"], name
