"""The warnings: on runs that collapse, as a real pair did, and none on one that is well."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from prune_opd.config import HorizonConfig, TrackConfig, TrainConfig
from prune_opd.track.health import warnings
from prune_opd.track.metrics import FILE_NAME, read_metrics
from prune_opd.track.report import write_report
from prune_opd.track.tracker import Tracker


def steps(count: int, **curves: tuple[float, float]) -> list[dict[str, Any]]:
    """Records whose numbers go evenly from the first to the last of each pair."""
    return [
        {"step": i + 1} | {name: a + (b - a) * i / (count - 1) for name, (a, b) in curves.items()} for i in range(count)
    ]


ENTROPIES = {"teacher_entropy": (5.0, 5.0)}
# The published objective on a real pair, fifteen steps (from transformers' numbers before and after).
COLLAPSE = {"divergence": (0.95, 0.08), "reverse_kl": (0.92, 0.88), "support_mass": (0.52, 0.31)}
COLLAPSE |= {"student_entropy": (5.2, 6.9), "teacher_entropy": (5.2, 5.2)}
# The full vocabulary from the same start.
HEALTHY = {"divergence": (0.92, 0.68), "reverse_kl": (0.92, 0.68), "support_mass": (0.52, 0.77)}
HEALTHY |= {"student_entropy": (5.2, 3.2), "teacher_entropy": (5.2, 3.0)}


def test_a_divergence_that_falls_alone_is_blind_and_mass_that_leaves_is_a_leak() -> None:
    found = warnings(steps(15, **COLLAPSE))
    assert found.keys() == {"blind", "leak"}
    assert "the objective's divergence fell by 84% and the full reverse KL by 4%" in found["blind"]
    assert "objective.name=full_vocab_reverse_kl" in found["blind"]
    assert "entropy rises" in found["leak"] and "lower optimizer.lr" in found["leak"]


def test_a_healthy_run_is_left_alone() -> None:
    assert warnings(steps(15, **HEALTHY)) == {}


def test_mass_that_goes_to_a_flatter_teacher_is_no_leak() -> None:
    curves = HEALTHY | {"support_mass": (0.8, 0.6), "student_entropy": (3.0, 4.8), "teacher_entropy": (5.0, 5.0)}
    assert warnings(steps(15, **curves)) == {}


def test_too_few_steps_and_records_of_older_versions_say_nothing() -> None:
    assert warnings(steps(5, **COLLAPSE)) == {}
    assert warnings(steps(15, divergence=(0.95, 0.08))) == {}
    assert warnings(steps(15, divergence=(0.95, 0.08), reverse_kl_sampled=(0.95, 0.08))) == {}


def test_an_estimate_stands_in_where_the_exact_kl_is_not_known() -> None:
    found = warnings(steps(15, divergence=(0.95, 0.08), reverse_kl_sampled=(0.92, 0.88)))
    assert found.keys() == {"blind"}


def test_an_objective_that_is_the_estimate_is_not_held_against_the_exact_kl() -> None:
    curves = {"divergence": (0.9, 0.3), "reverse_kl_sampled": (0.9, 0.3), "reverse_kl": (0.9, 0.8)}
    assert warnings(steps(15, **curves)) == {}


@pytest.mark.parametrize(("late", "kinds"), [(1.3, {"worse"}), (1.1, set())])
def test_a_kl_that_rises_at_the_same_positions_is_worse_and_one_at_new_positions_is_not(
    late: float, kinds: set[str]
) -> None:
    records = steps(8, divergence=(0.5, 0.5), reverse_kl=(0.5, 0.9))
    for i, record in enumerate(records):
        opened = [0.5 * late, 0.5 * late, 1.6, None] if i > 3 else [0.5, 0.5, None, None]
        record["reverse_kl_by_position"] = opened
    assert warnings(records).keys() == kinds


def test_a_warning_is_said_once_stands_in_the_records_and_heads_the_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    horizon, quiet = HorizonConfig("full", max_len=64, min_len=32), TrackConfig(wandb="disabled", report=False)
    config = TrainConfig("run", "student", "teacher", 15, horizon, track=quiet)
    records = steps(15, **COLLAPSE)
    for done in (0, 12):  # stopped after step 12, and resumed
        with Tracker(tmp_path, config, {}, resume_step=done, tokenizer=None) as tracker:
            for record in records[done : done + 12]:
                tracker.step(dict(record))
    printed = capsys.readouterr().out
    assert printed.count("warning: mass leaves the student's best ids") == 2  # once a process
    said = ["warning" in record for record in read_metrics(tmp_path / FILE_NAME)[0]]
    assert not any(said[:5]) and all(said[10:])
    assert "full KL 0.92" in printed and "full reverse KL to the teacher" in printed
    write_report([tmp_path], tmp_path / "report.html")
    assert "Warning, last at step 15: the objective" in (tmp_path / "report.html").read_text()


def engines(*means: list[float | None]) -> list[dict[str, Any]]:
    return [{"step": i + 1, "mismatch_mean_by_engine": mean} for i, mean in enumerate(means)]


def test_an_engine_that_goes_away_from_the_trainer_is_named_in_that_step() -> None:
    well = [[2e-7, 3e-7]] * 4
    assert warnings(engines(*well), 1e-3) == {}
    text = warnings(engines(*well, [2e-7, 4e-5]), 1e-3)["mismatch"]
    assert "rollout engine 1 and the trainer differ by 4e-05 nats" in text and "3e-07 in the steps before" in text
    assert "rollout.parity_every=1" in text
    assert warnings(engines(*well, [2e-7, 4e-5], well[0]), 1e-3) == {}, "it is well again"


def test_an_engine_that_is_far_from_the_first_step_on_is_named() -> None:
    assert "rollout engine 0" in warnings(engines([0.06, None]), 0.1)["mismatch"]
    assert warnings(engines([0.04, None]), 0.1) == {}


def test_small_mismatches_may_jump() -> None:
    assert warnings(engines([1e-8], [9e-6]), 1e-3) == {}, "below a hundredth of the limit it is rounding"


def test_records_without_a_mismatch_and_steps_without_tokens_say_nothing() -> None:
    assert warnings([{"step": 1}, {"step": 2}], 1e-3) == {} == warnings(engines([None, None], [None, None]), 1e-3)
    assert warnings([], 1e-3) == {}
