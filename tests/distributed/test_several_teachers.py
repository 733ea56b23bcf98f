"""Several teachers: one process equals the sum of single-teacher runs, and every layout of both equals one process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.ranks import run_ranks
from tests.distributed.tiny_run import LENGTHS, write_pair
from tests.distributed.worker_several_teachers import CASES, MIXED, reference_of
from tests.models import write_model

WORKER = Path(__file__).with_name("worker_several_teachers.py")
FP32 = [case for case in CASES if reference_of(case) != "bf16"]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    models, out = tmp_path_factory.mktemp("models"), tmp_path_factory.mktemp("out")
    write_pair(models)
    write_model(models / "other", seed=3, tied=False, hidden_size=96)  # wider, and with a head of its own
    found: dict[str, Any] = {}
    for ranks in (1, 2):
        run_ranks(WORKER, ranks, [models, out], timeout=400)
        found |= json.loads((out / f"{ranks}.json").read_text())
    return found


def test_the_gradient_is_the_weighted_sum_of_those_of_runs_with_one_teacher(results: dict[str, Any]) -> None:
    assert results["sum"]["gradient"] < 1e-5


def test_what_is_said_of_a_teacher_is_what_a_run_with_it_alone_says(results: dict[str, Any]) -> None:
    step = results["mixed"]["steps"][0]
    for name in "ab":
        alone = results["sum"][name]
        for key in ("overlap", "event_rate", "weight_mean", "divergence", "reverse_kl", "reliable_length", "tokens"):
            assert step[f"{key}_of_{name}"] == pytest.approx(alone[key], rel=1e-5), (name, key)
    assert step["tokens_of_a"] + step["tokens_of_b"] == step["tokens"]
    assert step["overlap_of_a"] > step["overlap_of_b"] + 0.1  # or the means could be of the wrong rows


def test_each_teacher_has_a_window_of_its_own(results: dict[str, Any]) -> None:
    _first, *_, last = results["mixed"]["steps"]
    assert last["horizon_of_a"] != last["horizon_of_b"]
    assert last["horizon"] == max(last["horizon_of_a"], last["horizon_of_b"])


@pytest.mark.parametrize("case", FP32)
def test_three_steps_equal_those_of_one_process(results: dict[str, Any], case: str) -> None:
    expected_steps = results[reference_of(case)]["steps"]
    for rank in results[case]:
        assert rank["gradient"] < 1e-5
        assert rank["parameters"] < 1e-5
        for got, expected in zip(rank["steps"], expected_steps, strict=True):
            for name in ("loss", "grad_norm"):
                assert got[name] == pytest.approx(expected[name], rel=1e-5), name
            for name, value in expected.items():
                if "_of_" in name:
                    assert got[name] == pytest.approx(value, rel=1e-5), name


@pytest.mark.parametrize("case", CASES)
def test_ranks_have_as_many_microbatches_as_each_other(results: dict[str, Any], case: str) -> None:
    first, *others = results[case]
    assert all(rank["steps"] == first["steps"] for rank in others)


def test_a_teacher_with_fewer_rows_than_ranks_leaves_a_microbatch_empty_and_says_so(results: dict[str, Any]) -> None:
    (step, *_), *_ = (rank["steps"] for rank in results["few DP2 | TP2, TP1"])
    assert step["microbatches_empty"] == 1 and step["dp_imbalance"] >= 1
    assert all(step["microbatches_empty"] == 0 for step in results["DP2 | TP1, TP2"][0]["steps"])


def test_bf16_is_as_far_from_fp32_in_the_layout_as_in_one_process(results: dict[str, Any]) -> None:
    one = results["bf16"]["gradient"]
    assert 0 < one < 0.05
    for rank in results["bf16 TP2 | TP1, TP2"]:
        assert 0 < rank["gradient"] < 3 * one


def test_the_comparison_has_something_to_compare(results: dict[str, Any]) -> None:
    assert len(MIXED) == len(LENGTHS)
    for step in results["mixed"]["steps"]:
        assert 0.05 < step["event_rate_of_a"] < 0.95
        assert step["microbatches"] > 2
