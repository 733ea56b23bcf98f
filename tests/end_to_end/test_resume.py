"""A run that was stopped and resumed has the same metrics as one that was not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from prune_opd.track.metrics import read_metrics
from tests.end_to_end.runs import BARE, check_ages, forked, steps_of, tiny_model, train, without_times

# A window that moves at once, a learning rate that warms up, an evaluation in the middle: all of it must continue.
SETTINGS = ("steps=4", "rollout.prompts=8", "evaluation.problems=8", "evaluation.every=2", *BARE[1:])


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tiny_model("student")
    path = tmp_path_factory.mktemp("resume") / "unbroken"
    train(path, *SETTINGS, "checkpoint.every=2")
    return path


def test_a_resumed_run_is_bit_identical_to_an_unbroken_one(unbroken: Path, tmp_path: Path) -> None:
    path = tmp_path / "stopped"
    first = train(path, *SETTINGS, "checkpoint.every=0", "stop_after=3")
    assert [step["step"] for step in first] == [1, 2, 3]
    train(path, *SETTINGS, "checkpoint.every=0")
    for ours, theirs in zip(
        read_metrics(path / "metrics.jsonl"), read_metrics(unbroken / "metrics.jsonl"), strict=True
    ):
        assert without_times(ours) == without_times(theirs)


def test_metrics_after_the_checkpoint_are_made_again(unbroken: Path) -> None:
    """As after a kill between two checkpoints: steps 3 and 4 are in the file, the checkpoint is of step 2."""
    expected = without_times(steps_of(unbroken))
    checkpoints = unbroken / "checkpoints"
    assert sorted(path.name for path in checkpoints.glob("step_*")) == ["step_000002", "step_000004"]
    (checkpoints / "latest").write_text("step_000002")
    train(unbroken, *SETTINGS, "checkpoint.every=2")
    assert without_times(steps_of(unbroken)) == expected


def test_a_checkpoint_resumes_in_another_layout(unbroken: Path, tmp_path: Path) -> None:
    """One rank goes on where two stopped: the same prompts, window and rollouts, numbers equal to rounding."""
    output = tmp_path / "one_rank"
    checkpoint = unbroken / "checkpoints" / "step_000002"
    forked(
        *("train", "tiny_compatible", *SETTINGS, "--nproc", "1", "--run-dir", output, "--resume", checkpoint)
    )  # fmt: skip
    there, here = steps_of(unbroken)[2:], steps_of(output)
    assert [step["step"] for step in here] == [3, 4]
    assert here[0]["rollout_digest"] == there[0]["rollout_digest"] and here[0]["horizon"] == there[0]["horizon"]
    assert here[0]["loss"] == pytest.approx(there[0]["loss"], rel=1e-4)
    state = json.loads((checkpoint / "state.json").read_text())
    assert state["step"] == 2 and state["sampler"] and state["controller"]


def test_partial_rollouts_go_on_after_a_resume_as_if_nothing_had_been(tmp_path: Path) -> None:
    """The groups that wait are in the checkpoint, with their tokens and these tokens' probabilities."""
    settings = ("steps=3", "rollout.prompts=8", "rollout.oversample=1.5", "rollout.partial=true", *BARE)
    whole = train(tmp_path / "whole", *settings, "checkpoint.every=0", "checkpoint.last=false")
    train(tmp_path / "stopped", *settings, "checkpoint.every=0", "stop_after=2")
    assert without_times(train(tmp_path / "stopped", *settings, "checkpoint.every=0")) == without_times(whole)
    assert [step["prompts_left"] for step in whole] == [4] * 3
    assert whole[0]["stale_tokens"] == 0 and "stale_ratio_mean" not in whole[0]
    later = whole[1:]
    assert all(step["stale_tokens"] > 0 and step["tokens_left"] > 0 for step in later)
    assert all(0.8 < step["stale_ratio_mean"] < 1.25 and step["stale_clip_fraction"] < 0.5 for step in later)
    for step in later:
        kept = step["tokens_trained"] - step["stale_tokens"]
        assert step["tokens_generated"] == kept + step["tokens_left"]


def test_reused_rollouts_go_on_after_a_resume_as_if_nothing_had_been(tmp_path: Path) -> None:
    """The run stops between two refreshes, and its evaluations put other weights into the engine.

    Without a refresh at all: test_semi_opd_cached.py.
    """
    settings = ("steps=3", "rollout.prompts=8", "rollout.refresh_every=2", "horizon.strategy=full", *BARE[1:])
    settings += ("evaluation.problems=4", "evaluation.every=1", "horizon.max_len=64", "optimizer.lr=1e-3")
    whole = train(tmp_path / "whole", *settings, "checkpoint.every=0", "checkpoint.last=false")
    train(tmp_path / "stopped", *settings, "checkpoint.every=0", "stop_after=1")
    assert without_times(train(tmp_path / "stopped", *settings, "checkpoint.every=0")) == without_times(whole)
    check_ages(whole, [0, 1, 0])
