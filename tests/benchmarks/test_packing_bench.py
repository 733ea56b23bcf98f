"""`prune-opd bench packing --quick` through the real command. No absolute times: other work shares the machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

COMMAND = Path(sys.executable).with_name("prune-opd")


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("bench")
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [COMMAND, "bench", "packing", "--quick"]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "bench" / "packing.json").read_text())


def test_packed_and_padded_rows_have_the_same_loss(result: dict[str, Any]) -> None:
    (case,) = result["cases"]
    assert case["loss"]["packed"] == pytest.approx(case["loss"]["padded"], rel=1e-5) != 0
    assert case["loss_apart"] <= 1e-5


def test_padding_is_what_the_padded_batch_has_more(result: dict[str, Any]) -> None:
    (case,) = result["cases"]
    packed, padded = case["tokens"]["packed"], case["tokens"]["padded"]
    assert 0 < case["padding_waste_padded"] == pytest.approx(1 - packed / padded)
    assert case["padding_waste_packed"] == 0
    assert 1 <= case["dp_imbalance_by_length"] <= case["dp_imbalance_in_turns"]


def test_both_are_timed_in_turns(result: dict[str, Any]) -> None:
    (case,) = result["cases"]
    assert [len(seconds) for seconds in case["wall_s"].values()] == [result["settings"]["rounds"]] * 2
    (packed,), (padded,) = case["wall_s"]["packed"], case["wall_s"]["padded"]
    assert case["time_packed_over_padded"] == packed / padded
