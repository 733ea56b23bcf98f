"""The comparison's arithmetic: rows, gaps, verdicts, tables and the page, from made-up runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.common import mean_and_error
from benchmarks.strategies.charts import write_charts
from benchmarks.strategies.plan import (
    METHODS,
    RunSpec,
)
from benchmarks.strategies.results import (
    Verdict,
    markdown,
    pair_rows,
    run_numbers,
    stop_verdicts,
    truncation_at,
    verdicts,
)
from benchmarks.strategies.runs import Result
from tests.benchmarks.strategies_runs import SEEDS, evaluation, recipe, step


def results(pair: str, **methods: tuple[list[float], int, float, int]) -> list[Result]:
    """Synthetic runs: method → (accuracy of every seed, tokens a step, seconds a phase and step, last window)."""
    known = {method.name: method for method in METHODS}
    return [
        (
            RunSpec(pair, known[name], seed, recipe(), problems_between=4),
            [step(1, window, tokens, seconds), step(2, window, tokens, seconds)],
            [evaluation(0, 0.1), evaluation(2, accuracy)],
        )
        for name, (accuracies, tokens, seconds, window) in methods.items()
        for seed, accuracy in zip(SEEDS, accuracies, strict=True)
    ]


def rows(pair: str, **methods: tuple[list[float], int, float, int]) -> list[dict[str, Any]]:
    return pair_rows(pair, METHODS, results(pair, **methods))


def test_a_row_has_means_standard_errors_over_seeds_and_savings_against_full() -> None:
    assert mean_and_error([1.0, 2.0, 3.0]) == (2.0, pytest.approx(1 / 3**0.5))
    assert mean_and_error([1.0]) == (1.0, None)
    full, prune = rows("p", full=([0.5, 0.6, 0.7], 100, 1.0, 216), prune=([0.5, 0.5, 0.5], 60, 0.5, 100))
    assert (full["accuracy"], full["accuracy_stderr"]) == (pytest.approx(0.6), pytest.approx(0.1 / 3**0.5))
    assert (full["tokens_generated"], full["cpu_s"], full["saved_cpu_s"]) == (200, 6.0, 0)  # sync is not counted
    assert (prune["saved_tokens_generated"], prune["saved_cpu_s"]) == (pytest.approx(0.4), pytest.approx(0.5))
    assert prune["phases_cpu_s"] == {"sync": 1.0, "rollout": 1.0, "teacher": 1.0, "train": 1.0}
    assert prune["runs"][0]["curve"][-1] == {"step": 2, "accuracy": 0.5, "tokens": 120, "cpu_s": 3.0}


def test_gaps_are_taken_seed_by_seed_against_full_opd_and_against_what_a_control_replays() -> None:
    runs = results("p", full=([0.5, 0.6, 0.7], 100, 1.0, 216), prune=([0.52, 0.64, 0.72], 60, 0.5, 100))
    runs += [run for run in results("p", replay=([0.5, 0.6, 0.0], 60, 0.5, 100)) if run[0].seed != 1003]
    full, prune, replay = pair_rows("p", METHODS, runs)
    assert full["gaps"] == {}
    # 2, 4 and 2 points: known to 0.7 of a point, though the accuracies spread by ten.
    assert prune["gaps"] == {"full": (pytest.approx(0.08 / 3), pytest.approx(0.02 / 3))}
    assert replay["gaps"] == {"full": (0, 0), "prune": (pytest.approx(-0.03), pytest.approx(0.01))}
    alone = pair_rows("p", METHODS, [run for run in runs if run[0].method.name == "prune"])
    assert alone[0]["gaps"] == {}
    text = markdown("p", [full, prune, replay], [], [])
    assert "| +2.7 ± 0.7 |" in text and "| 60.0% ± 5.8 | – |" in text


def test_tokens_that_an_in_flight_stop_threw_away_were_generated_too() -> None:
    steps = [step(1, 216) | {"tokens_dropped": 7}, step(2, 216)]
    numbers = run_numbers(steps, [evaluation(0, 0.1), evaluation(2, 0.5)])
    assert numbers["tokens_generated"] == numbers["curve"][-1]["tokens"] == 207
    assert numbers["tokens_trained"] == 200


@pytest.mark.parametrize(
    ("accuracy", "tokens", "seconds", "reached"),
    [
        (0.60, 60, 0.6, [True, True, True, True]),
        (0.60, 63, 0.7, [False, False, True, True]),
        (0.55, 60, 0.6, [True, True, True, False]),  # within a standard error of full, below the fixed windows
        (0.52, 60, 0.6, [True, True, False, False]),
    ],
)
def test_verdicts_of_a_drift_pair(accuracy: float, tokens: int, seconds: float, reached: list[bool]) -> None:
    found = rows(
        "x_drift",
        full=([0.5, 0.6, 0.7], 100, 1.0, 216),
        topd_25=([0.56] * 3, 25, 0.3, 54),
        prune=([accuracy] * 3, tokens, seconds, 90),
    )
    assert [verdict.reached for verdict in verdicts("x_drift", 216, found)] == reached


@pytest.mark.parametrize(
    ("accuracy", "tokens", "window", "reached"),
    [
        (0.60, 100, 216, [True, True, True]),
        (0.60, 106, 200, [False, False, True]),
        (0.40, 100, 216, [True, True, False]),
    ],
)
def test_verdicts_of_a_compatible_pair(accuracy: float, tokens: int, window: int, reached: list[bool]) -> None:
    found = rows("x", full=([0.5, 0.6, 0.7], 100, 1.0, 216), prune=([accuracy] * 3, tokens, 1.0, window))
    judged = verdicts("x", 216, found)
    assert [verdict.reached for verdict in judged] == reached
    assert [str(verdict).startswith("reached") for verdict in judged] == reached


# The in-flight stop, against the same method without it.


def stopping(on: tuple[int, float, float], off: tuple[int, float, float], accuracies: list[float]) -> list[Verdict]:
    """(tokens a step, reliable length, seconds) with and without; ten responses, and a warm-up ten times as long."""
    runs = results("p", full=([0.3] * 3, 100, 1.0, 216), prune=([0.30, 0.31, 0.32], 100, 1.0, 216))
    runs += results("p", inflight=(accuracies, 100, 1.0, 216))
    for spec, steps, _ in runs:
        tokens, reliable, seconds = on if spec.method.name == "inflight" else off
        for record, factor in zip(steps, (10, 1), strict=True):
            record |= {"tokens_generated": tokens, "tokens_trained": tokens, "response_length": tokens / 10}
            record |= {"reliable_length": reliable, "time_step": seconds * factor, "cpu_step": 2 * seconds * factor}
            record |= {"pruned_inflight": 4 if spec.method.name == "inflight" else 0}
    found = pair_rows("p", METHODS, runs)
    text = markdown("p", found, [], [])
    assert "| a step | prune | inflight |" in text and "| responses stopped | 0.0 | 4.0 |" in text
    assert found[1]["step"]["cpu_s"] == 2 * off[2]  # without the warm-up
    by_name = {row["method"]: row for row in found}
    return stop_verdicts("p", by_name["prune"], by_name["inflight"])


def test_the_stop_of_a_pair_that_drifts_must_cut_its_tail_and_be_faster() -> None:
    """70 of 100 tokens of a response are beyond the reliable length; with the stop 20 are."""
    found = stopping((500, 30, 6.0), (1000, 30, 8.0), [0.30, 0.31, 0.32])
    assert [verdict.reached for verdict in found] == [True] * 4
    assert [verdict.numbers for verdict in found][:3] == [f"{1 - 20 / 70:.1%}", "0.75", "0.75"]
    too_little = stopping((700, 30, 8.1), (1000, 30, 8.0), [0.30, 0.31, 0.32])
    assert [verdict.reached for verdict in too_little] == [False, False, False, True]


def test_the_stop_of_a_pair_that_does_not_drift_may_be_five_percent_slower() -> None:
    found = stopping((1000, 95, 8.3), (1000, 95, 8.0), [0.30, 0.31, 0.32])
    assert [verdict.reached for verdict in found] == [True, True, True]
    found = stopping((1000, 95, 8.5), (1000, 95, 8.0), [0.2] * 3)
    assert [verdict.reached for verdict in found] == [False, False, False]


def test_accuracy_of_a_fixed_window_at_equal_tokens_is_linear_between_those_that_ran() -> None:
    by_name = {
        "topd_25": {"tokens_generated": 100, "accuracy": 0.2},
        "full": {"tokens_generated": 300, "accuracy": 0.6},
    }
    assert [truncation_at(tokens, by_name) for tokens in (50, 100, 200, 300, 400)] == pytest.approx(
        [0.2, 0.2, 0.4, 0.6, 0.6]
    )
    assert truncation_at(1, {}) is None


def test_table_and_page_come_from_the_numbers(tmp_path: Path) -> None:
    found = rows("x", full=([0.5, 0.6, 0.7], 100, 1.0, 216), marginal=([0.5] * 3, 100, 1.0, 216))
    judged = verdicts("x", 216, found)
    text = markdown("x", found, judged, ["a note"])
    assert "| full OPD | 60.0% ± 5.8 | – | 0 k | 0 k | 2.0 (2.0) |" in text
    assert "a note" in text and str(judged[0]) in text
    sweeps = {"pair": "x", "seeds": [1001], "rows": {"k": [{**found[1], "value": k} for k in (2, 4)]}}
    pair = {"rows": found, "verdicts": [{"text": str(verdict)} for verdict in judged]}
    path = tmp_path / "strategies.json"
    path.write_text(json.dumps({"pairs": {"x": pair}, "sweeps": sweeps, "seeds": SEEDS}))
    (tmp_path / "strategies").mkdir()
    page = write_charts(path).read_text()
    assert page.count("data:image/svg+xml;base64") == 9
    assert "60.0% ± 5.8" in page and 'src="http' not in page
    assert (tmp_path / "strategies" / "x.png").stat().st_size > 10_000
