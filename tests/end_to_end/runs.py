"""Real runs for the end-to-end tests: the `prune-opd` command on the tiny models, as a user types it or forked."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from prune_opd.config.recipe import load_recipe
from prune_opd.track.metrics import read_metrics
from tests.forked.command import run_command

COMMAND = Path(sys.executable).with_name("prune-opd")
# What a test of the training itself does not need, and what would take its time.
BARE = ("evaluation.problems=0", "checkpoint.export_hf=false", "track.wandb=disabled", "track.report=false")


def prune_opd(*args: str | Path, timeout: float = 300.0) -> str:
    """Run the command and return its stdout. AssertionError with all output when it fails or the time is up."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(
        [str(COMMAND), *map(str, args)], env=environment, capture_output=True, text=True, timeout=timeout
    )
    assert result.returncode == 0, f"prune-opd {args}: exit code {result.returncode}\n{result.stdout}\n{result.stderr}"
    return result.stdout


def forked(*args: str | Path, timeout: float = 300.0) -> str:
    """`prune_opd`, without new interpreters: for tests of what a run does, not of how it starts."""
    result = run_command(*args, timeout=timeout)
    assert result.code == 0, f"prune-opd {args}: exit code {result.code}\n{result.stdout}\n{result.stderr}"
    return result.stdout


def train(run_dir: Path, *args: str) -> list[dict[str, Any]]:
    """Train the tiny pair in `run_dir` and return its step records."""
    forked("train", "tiny_compatible", *args, "--run-dir", run_dir)
    return steps_of(run_dir)


def steps_of(run_dir: Path) -> list[dict[str, Any]]:
    return read_metrics(run_dir / "metrics.jsonl")[0]


def without_times(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {
            key: value
            for key, value in record.items()
            if not key.startswith(("time_", "cpu_", "memory_", "flops_", "speed_", "mfu_"))
        }
        for record in records
    ]


def tiny_model(which: str) -> Path:
    """The directory of a tiny model. Fails, and says how to get it, when it is not there: these tests need it."""
    config: Any = load_recipe("tiny_compatible")
    path = Path(getattr(config, which))
    if not (path / "model.safetensors").exists():
        pytest.fail(f"{path} is missing: make tiny-models", pytrace=False)
    return path


def check_ages(steps: list[dict[str, Any]], ages: list[int]) -> None:
    """Steps whose rollouts are reused generate nothing and know how far the student has moved since."""
    assert [step["rollout_age"] for step in steps] == ages
    for step in steps:
        reused = step["rollout_age"] > 0
        assert (step["tokens_generated"] == 0) == reused and step["stale_tokens"] == reused * step["tokens_trained"]
        assert ("stale_ratio_mean" in step) == reused
