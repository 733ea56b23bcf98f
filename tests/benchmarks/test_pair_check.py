"""The four tests of a drift pair on made-up curves, and the measurements they rest on."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks.studies.pair.measure import curves
from benchmarks.studies.pair_check.command import LIMITS, QUICK, full_opd, verdicts
from prune_opd.errors import ConfigError

FLAT, FALLING = [0.9, 0.9, 0.9, 0.9], [0.9, 0.8, 0.7, 0.6]


def model(accuracy: float, own: list[float], gold: list[float] = FLAT, events: float = 0.01) -> dict[str, Any]:
    def curve(overlap: list[float]) -> dict[str, Any]:
        return {"overlap": overlap, "events": [events] * 4, "tokens": [1000] * 4}

    return {"accuracy": accuracy, "stderr": 0.03, "gold": curve(gold), "own": curve(own)}


def passed(**changes: dict[str, Any]) -> list[bool]:
    """The verdicts on an honest drift pair with one of its models changed."""
    honest = {
        "teacher": model(0.8, FLAT),
        "before": model(0.1, FALLING),
        "half": model(0.3, FALLING),
        "after": model(0.5, FLAT),
    }
    return [verdict.passed for verdict in verdicts(honest | changes)]


def test_an_honest_drift_pair_passes_all_four() -> None:
    assert passed() == [True] * 4


def test_a_teacher_within_two_standard_errors_does_not_beat_the_student() -> None:
    assert passed(teacher=model(0.18, FLAT)) == [False, True, True, True]


@pytest.mark.parametrize("events", [0.01, 0.2])
def test_a_teacher_that_is_lost_on_gold_text_is_no_drift(events: float) -> None:
    gold = FALLING if events == 0.01 else FLAT
    assert not passed(before=model(0.1, FALLING, gold, events))[1]


def test_overlap_that_falls_on_gold_text_too_is_no_decay_of_the_students_own() -> None:
    assert not passed(before=model(0.1, FALLING, gold=FALLING))[2]


def test_a_compatible_pair_fails_the_third_test_only_where_drift_is_asked_for() -> None:
    assert passed(before=model(0.1, FLAT)) == [True, True, False, True]


def test_full_opd_has_to_learn_and_to_have_drift_left_at_half_time() -> None:
    assert not passed(after=model(0.12, FLAT))[3]
    assert not passed(half=model(0.3, FLAT))[3]


def test_parts_with_too_few_tokens_say_nothing() -> None:
    before = model(0.1, [0.9, 0.9, 0.9, 0.1])
    before["own"]["tokens"][-1] = LIMITS.least_tokens - 1
    assert not passed(before=before)[2]


def trap(**changes: dict[str, Any]) -> list[bool]:
    """The verdicts on an honest trap pair with one of its models changed."""

    def lost(accuracy: float, last: float = 0.99, kl: float = 1e-4) -> dict[str, Any]:
        found = model(accuracy, [0.8, 0.9, 0.97, last])
        found["own"]["kl"] = [2.0, 0.5, 0.01, kl]
        return found

    honest = {"teacher": lost(0.8), "before": lost(0.1), "half": lost(0.3), "after": lost(0.5)}
    changed = {name: lost(**change) for name, change in changes.items()}
    return [verdict.passed for verdict in verdicts(honest | changed, "trap")]


def test_a_trap_pair_agrees_on_what_is_lost() -> None:
    assert trap() == [True] * 4
    assert trap(before={"accuracy": 0.1, "last": 0.85}) == [True, True, False, True]  # that is drift
    assert trap(before={"accuracy": 0.1, "kl": 0.3}) == [True, True, False, True]  # something is left to learn
    assert trap(half={"accuracy": 0.3, "kl": 0.3}) == [True, True, True, False]
    assert not trap(after={"accuracy": 0.12})[3]


def test_curves_are_means_by_position_in_the_response() -> None:
    overlap, event = torch.tensor([1.0, 0.0, 1.0, 0.5]), torch.tensor([False, True, False, True])
    result = curves(overlap, event, [1, 3], bins=2, max_len=4)
    assert result == {"overlap": [2 / 3, 0.5], "events": [1 / 3, 1.0], "tokens": [3, 1]}


def test_the_full_opd_of_a_recipe_is_all_full_rollouts_and_keeps_its_half_time() -> None:
    config = full_opd("tiny_compatible", QUICK)
    assert (config.horizon.strategy, config.steps, config.checkpoint.every) == ("full", 2, 1)


def test_a_recipe_that_distils_no_ledger_pair_is_refused() -> None:
    with pytest.raises(ConfigError, match="tiny_teacher"):
        full_opd("tiny_teacher", QUICK)
