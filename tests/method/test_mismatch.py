"""What a token counts where trainer and rollout engine differ, and how their distance is measured: by hand."""

from __future__ import annotations

import math

import pytest
import torch

from prune_opd.config import ObjectiveConfig
from prune_opd.loss.mismatch import Mismatch
from prune_opd.method.mismatch import engine_correction

LOGP = torch.tensor([0.2, 0.2, 0.2, 0.2, 0.2]).double().log()
# ρ = 1, 2.5, 0.4, 6, and a token of which the engine says nothing
ENGINE = torch.cat([torch.tensor([0.2, 0.08, 0.5, 0.2 / 6]).double().log(), torch.tensor([math.nan]).double()])
CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"mismatch": "none"}, [1, 1, 1, 1, 1]),
        ({"mismatch": "truncated"}, [1, 2, 0.4, 2, 1]),
        ({"mismatch": "truncated", "mismatch_high": 3.0}, [1, 2.5, 0.4, 3, 1]),
        ({"mismatch": "masked"}, [1, 2.5, 0, 0, 1]),
        ({"mismatch": "masked", "mismatch_low": 0.3, "mismatch_high": 2.0}, [1, 0, 0.4, 0, 1]),
    ],
)
def test_correction(settings: dict, expected: list[float]) -> None:
    weight_N = engine_correction(ObjectiveConfig(**settings), LOGP, ENGINE)
    torch.testing.assert_close(weight_N, torch.tensor(expected).double())


def test_figures_are_those_of_the_tokens_of_each_engine() -> None:
    """Rows 0 and 2 are engine 0's, row 1 is engine 1's; row 2 has a stale token first, which does not count."""
    ratios_B = [[1.0, 2.0], [0.25], [math.nan, 4.0]]
    logp = math.log(0.1)
    mismatch = Mismatch([[logp - math.log(r) for r in row] for row in ratios_B], [0, 1, 0], (0.5, 2.5), CPU)
    for rows in ([2, 0], [1]):  # two micro-batches
        tokens = sum(len(ratios_B[row]) for row in rows)
        lengths = torch.tensor([len(ratios_B[row]) for row in rows])
        mismatch.add(rows, lengths, torch.full((tokens,), logp, dtype=torch.float64))
    got = mismatch.record()
    two = math.log(2)
    assert got["mismatch_mean"] == pytest.approx((0 + two + 2 * two + 2 * two) / 4)
    assert got["mismatch_max"] == pytest.approx(2 * two)
    assert got["mismatch_ratio_mean"] == pytest.approx((1 + 2 + 0.25 + 4) / 4)
    assert got["mismatch_k3"] == pytest.approx((0 + (1 - two) + (2 * two - 0.75) + (3 - 2 * two)) / 4)
    assert got["mismatch_outside"] == pytest.approx(2 / 4)
    assert got["mismatch_mean_by_engine"] == pytest.approx([two, 2 * two])
    assert got["mismatch_outside_by_engine"] == pytest.approx([1 / 3, 1])
    assert got["mismatch_max_by_engine"] == pytest.approx([2 * two, 2 * two])
    assert mismatch.worst() == (1, pytest.approx(2 * two))


def test_an_engine_without_a_token_has_no_figures() -> None:
    mismatch = Mismatch([[math.nan], [-1.0]], [0, 1], (0.5, 2.0), CPU)
    mismatch.add([0, 1], torch.tensor([1, 1]), torch.tensor([-1.0, -1.5]))
    assert mismatch.record()["mismatch_mean_by_engine"] == [None, pytest.approx(0.5)]
    assert mismatch.worst() == (1, pytest.approx(0.5))
    nothing = Mismatch([[math.nan]], [0], (0.5, 2.0), CPU)
    assert nothing.worst() is None and nothing.record()["mismatch_mean"] is None


def test_the_estimate_of_the_kl_is_right() -> None:
    """k3 of samples from the engine's distribution, weighted by it, is KL(engine ‖ trainer)."""
    draw = torch.Generator().manual_seed(1)
    engine_V, trainer_V = torch.randn(2, 6, generator=draw, dtype=torch.float64).log_softmax(-1)
    mismatch = [Mismatch([[float(logp)]], [0], (0.5, 2.0), CPU) for logp in engine_V]
    for of_token, logp in zip(mismatch, trainer_V, strict=True):
        of_token.add([0], torch.tensor([1]), logp[None])
    k3_V = torch.tensor([float(of_token.sums_B6[0, 1]) for of_token in mismatch], dtype=torch.float64)
    expected = (engine_V.exp() * (engine_V - trainer_V)).sum()
    torch.testing.assert_close((engine_V.exp() * k3_V).sum(), expected)
