"""Engines that differ from the trainer: a stale or broken layer is noticed in its step, a coarse format is not one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from prune_opd.config.rollout import MISMATCH_LIMIT
from prune_opd.track.metrics import read_metrics
from tests.distributed.ranks import run_ranks
from tests.distributed.tiny_run import write_pair

WORKER = Path(__file__).with_name("worker_mismatch.py")

Results = dict[str, Any]


def launch(folder: Path, quantization: str) -> Results:
    write_pair(folder)
    run_ranks(WORKER, 2, [folder, folder, quantization], timeout=180)
    steps, _ = read_metrics(folder / "run" / "metrics.jsonl")
    return json.loads((folder / "results.json").read_text()) | {"steps": steps}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    return launch(tmp_path_factory.mktemp("fp32"), "none")


def test_a_good_start_has_a_mismatch_of_rounding_alone(results: Results) -> None:
    for step in results["steps"][:2]:
        assert 0 < step["mismatch_mean"] <= step["mismatch_max"] < MISMATCH_LIMIT["fp32"] / 10
        assert step["mismatch_ratio_mean"] == pytest.approx(1, abs=1e-5)
        assert 0 <= step["mismatch_k3"] < 1e-8 and step["mismatch_outside"] == 0
        assert len(step["mismatch_mean_by_engine"]) == 2
        assert "warning" not in step


def test_a_stale_layer_is_noticed_in_the_step_that_has_it(results: Results) -> None:
    stale, well = results["steps"][2:4]
    good, bad = stale["mismatch_mean_by_engine"]
    assert good < MISMATCH_LIMIT["fp32"] / 100 < bad, "the other engine is well"
    assert "rollout engine 1 and the trainer differ by" in stale["warning"]
    assert results["said"].count("warning: rollout engine 1 and the trainer differ by") == 1
    assert max(well["mismatch_mean_by_engine"]) < MISMATCH_LIMIT["fp32"] / 100 and "warning" not in well


def test_a_broken_layer_ends_the_run_on_every_rank_and_its_step_is_in_the_metrics(results: Results) -> None:
    first, second = results["errors"]
    assert first == second
    assert first.startswith("step 5: rollout engine 1 and the trainer differ by")
    assert "limit: 0.001" in first and "start again from the last checkpoint" in first
    last = results["steps"][-1]
    assert last["step"] == 5 and last["mismatch_mean_by_engine"][1] > 0.1 and "rollout engine 1" in last["warning"]


def test_fp8_rollouts_of_a_bf16_trainer_differ_are_corrected_and_raise_no_alarm(tmp_path: Path) -> None:
    steps = launch(tmp_path, "fp8_per_channel")["steps"]
    for step in steps:
        assert 1e-3 < step["mismatch_mean"] < MISMATCH_LIMIT["fp8"] / 2, "rounding of the weights to FP8"
        assert step["mismatch_k3"] > 1e-6
        assert step["mismatch_ratio_mean"] == pytest.approx(1, abs=0.2)
        assert "warning" not in step
        assert step["updates_skipped"] == 0
