"""Real runs in which the teacher reads a hint, and in which it is the student itself: two ranks, vLLM, a resume."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.end_to_end.runs import BARE, forked, steps_of, train, without_times

HINT = ("data.teacher_prompt={prompt} {solution} <ask>", "data.max_teacher_prompt_len=288")
SETTINGS = ("steps=3", "rollout.prompts=8", "optimizer.lr=1e-3", *BARE)
TWO_STEPS = (
    *SETTINGS,
    "steps=2",
    "parallel.nproc=1",
    "parallel.tensor=1",
    "checkpoint.every=0",
    "checkpoint.last=false",
)
# The average in another layout than the student's, and a gate that looks at the responses on the way.
AVERAGED = (
    "teacher=ema",
    "teacher_ema.decay=0.5",
    "parallel.teacher_tensor=1",
    "rollout.inflight.mode=gate",
    "rollout.inflight.first_check=16",
    *HINT,
)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the moving average that stops after its second step."""
    path = tmp_path_factory.mktemp("hint") / "stopped"
    train(path, *SETTINGS, *AVERAGED, "checkpoint.every=0", "stop_after=2")
    return path


def test_a_moving_average_goes_on_after_a_resume_bit_for_bit(stopped: Path, tmp_path: Path) -> None:
    whole = train(tmp_path / "whole", *SETTINGS, *AVERAGED, "checkpoint.every=0", "checkpoint.last=false")
    first = steps_of(stopped)
    assert [step["step"] for step in first] == [1, 2]
    other = tmp_path / "one_rank"
    forked(
        *("train", "tiny_compatible", *SETTINGS, *AVERAGED, "--nproc", "1", "--run-dir", other),
        *("--resume", stopped / "checkpoints" / "step_000002"),
    )
    assert without_times(train(stopped, *SETTINGS, *AVERAGED, "checkpoint.every=0")) == without_times(whole)
    assert all(step["loss"] != 0 and step["inflight_checks"] > 0 for step in whole)
    # In another layout of both models the average is the same too: rollouts equal, the loss to rounding.
    here, there = steps_of(other)[0], whole[2]
    assert here["rollout_digest"] == there["rollout_digest"]
    assert here["loss"] == pytest.approx(there["loss"], rel=1e-4)


def test_the_teachers_prompt_is_in_metrics_and_samples(stopped: Path) -> None:
    for step in steps_of(stopped):
        assert 150 < step["teacher_prompt_length"] <= 288
    samples = [json.loads(line) for line in (stopped / "samples.jsonl").read_text().splitlines()]
    assert samples
    for sample in samples:
        assert sample["teacher_prompt"].startswith(sample["prompt"][:200])
        assert sample["teacher_prompt"].endswith("<ask>") and "\\boxed" in sample["teacher_prompt"]


def test_a_hint_that_says_nothing_changes_nothing(tmp_path: Path) -> None:
    plain = train(tmp_path / "plain", *TWO_STEPS)
    same = train(tmp_path / "same", *TWO_STEPS, "data.teacher_prompt={prompt}")
    assert without_times(same) == without_times(plain)


def test_a_frozen_student_without_a_hint_teaches_nothing_and_with_one_something(tmp_path: Path) -> None:
    """Nothing but rounding, that is: Adam takes a whole step however small a gradient is, so later steps have some."""
    first, second = train(tmp_path / "control", *TWO_STEPS, "teacher=student")
    assert first["loss"] == first["reverse_kl"] == first["grad_norm"] == first["event_rate"] == 0
    assert abs(second["loss"]) < 1e-5 and second["reverse_kl"] < 1e-6 and second["event_rate"] == 0
    (hinted,) = train(tmp_path / "hint", *TWO_STEPS, "teacher=student", "stop_after=1", *HINT)
    assert hinted["reverse_kl"] > 1e-3
