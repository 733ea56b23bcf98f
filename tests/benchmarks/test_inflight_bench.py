"""`prune-opd bench inflight`: its arithmetic on made-up runs, and one quick comparison through the real command."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.strategies.inflight import Settings, compare

COMMAND = Path(sys.executable).with_name("prune-opd")


def training(side: str, seed: int, tokens: int, reliable: float, seconds: float, accuracy: float) -> dict[str, Any]:
    """Two steps of ten responses; the first is the warm-up, which takes ten times as long."""
    steps = [
        {
            "step": number,
            "tokens_generated": tokens,
            "tokens_trained": tokens,
            "response_length": tokens / 10,
            "reliable_length": reliable,
            "pruned_inflight": 4 if side == "on" else 0,
            "time_step": seconds * factor,
            "cpu_step": 2 * seconds * factor,
        }
        for number, factor in ((1, 10), (2, 1))
    ]
    return {
        "side": side,
        "seed": seed,
        "steps": steps,
        "evaluations": [{"step": 2, "eval_ledger": accuracy, "eval_ledger_stderr": 0.02}],
    }


def verdicts(result: dict[str, Any]) -> dict[str, bool]:
    return {target["name"]: target["reached"] for target in result["targets"]}


CUT, WALL, CPU, ACCURACY = (
    "share of the tokens beyond the reliable length that is cut",
    "step time (wall) on / off",
    "step time (CPU seconds) on / off",
    "final accuracy lost, against its standard error",
)


def test_a_pair_that_drifts_must_lose_its_tail_and_be_faster() -> None:
    """70 of 100 tokens of a response are beyond the reliable length; with the gate 20 are."""
    runs = [training("off", seed, 1000, 30, 8.0, 0.30 + 0.01 * seed) for seed in range(3)]
    runs += [training("on", seed, 500, 30, 6.0, 0.30 + 0.01 * seed) for seed in range(3)]
    result = compare(runs, Settings())
    assert result["drifts"] and result["tokens_beyond_cut"] == pytest.approx(1 - 20 / 70)
    assert result["ratios"] == {"tokens": 0.5, "time_step": 0.75, "cpu_step": 0.75}
    assert result["sides"]["off"]["time_step"] == 8.0  # without the warm-up
    assert verdicts(result) == {CUT: True, WALL: True, CPU: True, ACCURACY: True}


def test_one_that_does_not_drift_may_be_five_percent_slower() -> None:
    runs = [training("off", seed, 1000, 95, 8.0, 0.8) for seed in range(2)]
    result = compare([*runs, *(training("on", seed, 1000, 95, 8.3, 0.8) for seed in range(2))], Settings())
    assert not result["drifts"] and verdicts(result) == {WALL: True, CPU: True, ACCURACY: True}
    result = compare([*runs, *(training("on", seed, 1000, 95, 8.5, 0.7) for seed in range(2))], Settings())
    assert verdicts(result) == {WALL: False, CPU: False, ACCURACY: False}


def test_too_little_cut_is_a_miss() -> None:
    runs = [training("off", 0, 1000, 30, 8.0, 0.3), training("on", 0, 700, 30, 8.1, 0.3)]
    assert verdicts(compare(runs, Settings())) == {CUT: False, WALL: False, CPU: False, ACCURACY: True}


def test_both_sides_of_a_pair_are_trained(tmp_path: Path) -> None:
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [COMMAND, "bench", "inflight", "--quick"]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "bench" / "inflight.json").read_text())
    off, on = result["pairs"]["tiny_compatible"]["sides"].values()
    assert off["tokens"] > 0 and on["tokens"] > 0
    assert off["checks"] == 0 < on["checks"] and on["teacher_tokens_inflight"] > 0
    first = {run["side"]: run["steps"][0] for run in result["raw"]["tiny_compatible"]}
    assert first["off"]["horizon"] == first["on"]["horizon"]
    assert first["on"]["tokens_generated"] <= first["off"]["tokens_generated"]
