"""The warnings: on runs that collapse, as a real pair did, and none on one that is well."""

from __future__ import annotations

from typing import Any

import pytest

from prune_opd.track.health import warnings


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
