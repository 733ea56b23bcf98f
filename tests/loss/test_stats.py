"""What the log says of the gate: sums over the global batch, and curves over the position in the response."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest
import torch

from prune_opd.loss.stats import BatchStats, GateStats

CPU = torch.device("cpu")
# Responses of 3, 1, 0 and 5 tokens: (overlap, event, weight) of each, and the reliable lengths.
RESPONSES: list[list[tuple[float, bool, float]]] = [
    [(1.0, False, 1.5), (0.5, True, 1.25), (0.25, True, 1.0)],
    [(0.75, False, 1.5)],
    [],
    [(0.5, True, 1.0), (0.5, False, 1.0), (1.0, False, 0.75), (0.0, True, 0.5), (0.25, True, 0.5)],
]
RELIABLE = [3, 1, 0, 4]


def gate_stats(rows: list[int]) -> GateStats:
    """As the fused loss returns them for a micro-batch of these rows; what is not looked at is zero."""
    tokens = [token for row in rows for token in RESPONSES[row]]
    values: dict[str, Any] = {
        "overlap_N": torch.tensor([overlap for overlap, _, _ in tokens], dtype=torch.float32),
        "event_N": torch.tensor([event for _, event, _ in tokens], dtype=torch.bool),
        "weight_N": torch.tensor([weight for _, _, weight in tokens], dtype=torch.float32),
        "reliable_length_B": torch.tensor([RELIABLE[row] for row in rows], dtype=torch.int64),
        "length_B": torch.tensor([len(RESPONSES[row]) for row in rows], dtype=torch.int64),
    }
    zeros = {field.name: torch.zeros(len(tokens)) for field in fields(GateStats) if field.name.endswith("_N")}
    return GateStats(**(zeros | values))


def record(*micro_batches: list[int], bins: int = 2, max_len: int = 4) -> dict[str, Any]:
    stats = BatchStats(len(RESPONSES), bins, max_len, CPU)
    for rows in micro_batches:
        stats.add(rows, gate_stats(rows))
    return stats.record()


def test_means_are_over_all_response_tokens_of_the_batch() -> None:
    got = record([0, 1, 2, 3])
    assert got["overlap"] == pytest.approx((1.75 + 0.75 + 2.25) / 9)
    assert got["event_rate"] == pytest.approx(5 / 9)
    assert got["weight_mean"] == pytest.approx((3.75 + 1.5 + 3.75) / 9)
    assert got["reliable_length"] == pytest.approx(8 / 4)  # over responses, the empty one included


def test_a_curve_has_the_mean_of_each_stretch_of_positions() -> None:
    """Two bins over four tokens: positions 0 and 1; positions 2, 3 and, clamped, the fifth token of the last row."""
    got = record([0, 1, 2, 3])
    assert got["overlap_by_position"] == pytest.approx([(1 + 0.5 + 0.75 + 0.5 + 0.5) / 5, (0.25 + 1 + 0 + 0.25) / 4])
    assert got["weight_by_position"] == pytest.approx([(1.5 + 1.25 + 1.5 + 1 + 1) / 5, (1 + 0.75 + 0.5 + 0.5) / 4])


def test_bins_that_do_not_divide_the_horizon_take_positions_in_proportion() -> None:
    """Three bins over five tokens: positions 0-1, 2-3, 4 (floor of position * 3 / 5)."""
    got = record([3], bins=3, max_len=5)
    assert got["overlap_by_position"] == pytest.approx([0.5, 0.5, 0.25])


def test_positions_that_no_response_has_reached_have_no_value() -> None:
    got = record([0, 1, 2], bins=5, max_len=5)
    assert got["overlap_by_position"] == [pytest.approx(0.875), 0.5, 0.25, None, None]
    assert got["weight_by_position"][3:] == [None, None]


@pytest.mark.parametrize("micro_batches", [([0], [1], [2], [3]), ([0, 1], [2, 3]), ([3, 1], [2, 0])])
def test_the_cut_into_micro_batches_does_not_show(micro_batches: tuple[list[int], ...]) -> None:
    assert record(*micro_batches) == record([0, 1, 2, 3])


def test_reliable_lengths_stand_at_their_rows_of_the_global_batch() -> None:
    stats = BatchStats(len(RESPONSES), 2, 4, CPU)
    for rows in ([3, 1], [0]):  # row 2 belongs to another data-parallel rank
        stats.add(rows, gate_stats(rows))
    assert stats.reliable_length_B.tolist() == [3, 1, 0, 4]


def test_many_equal_float32_values_add_up_without_rounding() -> None:
    """A long batch in float32 sums would drift; the sums are float64."""
    count = 200_000
    ones = {name: torch.full((count,), 0.1) for name in ("overlap_N", "weight_N")}
    zeros = {field.name: torch.zeros(count) for field in fields(GateStats) if field.name.endswith("_N")}
    stats = BatchStats(1, 1, count, CPU)
    lengths = {"reliable_length_B": torch.tensor([count]), "length_B": torch.tensor([count])}
    stats.add([0], GateStats(**(zeros | ones | lengths)))
    assert stats.record()["overlap"] == pytest.approx(float(torch.tensor(0.1)), rel=1e-12)


def test_an_empty_batch_has_numbers_and_no_curve() -> None:
    got = BatchStats(2, 3, 9, CPU).record()
    assert (got["overlap"], got["event_rate"], got["weight_mean"], got["reliable_length"]) == (0, 0, 0, 0)
    assert got["overlap_by_position"] == [None, None, None]


def test_what_tells_of_the_run_is_a_token_mean_and_an_unknown_kl_is_null_with_its_estimate_beside() -> None:
    count = 4
    values = {field.name: torch.zeros(count) for field in fields(GateStats) if field.name.endswith("_N")}
    values |= {
        "sampled_logp_N": torch.tensor([-1.0, -1.0, -1.0, -1.0]),
        "teacher_logp_N": torch.tensor([-1, -2, -3, -2.0]),
    }
    values |= {
        "student_entropy_N": torch.tensor([1.0, 2.0, 3.0, 4.0]),
        "acceptance_N": torch.tensor([0.2, 0.4, 0.6, 0.8]),
        "overlap_N": torch.tensor([1.0, 0.0, 0.5, 1.0]),
    }
    lengths = {"reliable_length_B": torch.tensor([3, 1]), "length_B": torch.tensor([3, 1])}
    known = BatchStats(2, 1, 4, CPU, early=(2, 2))
    known.add([0, 1], GateStats(**(values | lengths | {"reverse_kl_N": torch.full((count,), 0.5)})))
    record = known.record()
    assert record["reverse_kl"] == 0.5 and record["student_entropy"] == 2.5 and record["teacher_logp"] == -2
    assert record["reverse_kl_sampled"] == 1
    assert record["reverse_kl_sampled_stderr"] == pytest.approx((0.5 / 4) ** 0.5)  # variance .5 of four tokens
    acceptance = [3, 0.2 + 0.4 + 0.8, 0.04 + 0.16 + 0.64]  # 2 tokens of the first response, 1 of the other's 1
    assert known.early.tolist() == pytest.approx([*acceptance, 1, 0, 2])
    assert known.early_kl.item() == 1.5
    unknown = BatchStats(2, 1, 4, CPU)
    unknown.add([0, 1], GateStats(**(values | lengths | {"reverse_kl_N": torch.full((count,), float("nan"))})))
    assert unknown.record()["reverse_kl"] is None and unknown.record()["reverse_kl_by_position"] == [1.0]
    assert not unknown.early.any() and not unknown.early_kl.any()


def test_signals_near_the_end_of_the_window_are_means_over_the_bins_there() -> None:
    count = 8
    values = {field.name: torch.zeros(count) for field in fields(GateStats) if field.name.endswith("_N")}
    values["overlap_N"] = torch.tensor([1, 1, 0.8, 0.6, 0.5, 0.3, 0.2, 0.1])
    values["teacher_mass_N"] = torch.tensor([1, 1, 1, 1, 0.9, 0.7, 0.5, 0.1])
    values["sampled_logp_N"], values["teacher_logp_N"] = torch.zeros(count), -torch.arange(8.0)
    lengths = {"reliable_length_B": torch.tensor([8]), "length_B": torch.tensor([8])}
    stats = BatchStats(1, 8, 16, CPU)  # bins of two tokens
    stats.add([0], GateStats(**(values | lengths)))
    near = stats.near(end=8, tokens=4)
    assert near == pytest.approx(
        {"overlap": 0.275, "support_mass_teacher": 0.55, "gap": 5.5, "gap_size": ((16 + 25 + 36 + 49) / 4) ** 0.5}
    )
    assert stats.near(end=16, tokens=4) is None
    assert stats.near(end=1, tokens=0) is not None  # the bin of its only token
