"""Offload of the real student, gradients, optimizer and teacher: training must not notice. And why masters are fp32."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.ranks import run_ranks
from tests.distributed.tiny_run import write_pair

WORKER = Path(__file__).with_name("worker_memory.py")
CASES = [f"{dtype}, distributed={sharded}" for dtype in ("fp32", "bf16") for sharded in (False, True)]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("memory")
    write_pair(folder)
    run_ranks(WORKER, 2, [folder, folder], timeout=180)
    found: dict[str, Any] = json.loads((folder / "rank0.json").read_text())
    return found


@pytest.mark.parametrize("case", CASES)
def test_training_is_bit_identical_when_everything_moves_between_phases(results: dict[str, Any], case: str) -> None:
    assert results[case]["move"] == results[case]["stay"]
    assert results[case]["same weights"]
    losses = [loss for loss, _ in results[case]["stay"]]
    assert len(set(losses)) == len(losses)  # it did train


@pytest.mark.parametrize("case", CASES)
def test_a_rollout_finds_the_device_empty(results: dict[str, Any], case: str) -> None:
    """fp32 parameters are their own masters, so there the student's storages are in the optimizer's hands too."""
    assert all(size > 0 for size in results[case]["left if it stays"].values())
    left = dict(results[case]["left if it moves"])
    step_counters = left.pop("optimizer")
    assert left == {"student": 0, "gradients": 0, "teacher": 0}
    assert step_counters == 0


def test_a_learning_rate_of_1e_6_rounds_to_nothing_in_bf16_alone(results: dict[str, Any]) -> None:
    assert results["tiny updates"]["changed alone"] == 0


def test_the_same_updates_accumulate_in_fp32_masters(results: dict[str, Any]) -> None:
    found = results["tiny updates"]
    assert found["masters are fp32"] == found["weights are the rounded masters"] == 1
    assert 2e-5 < found["median move of the masters"] < 7e-5  # 64 updates of about 1e-6
    assert found["changed with masters"] > 0.01
