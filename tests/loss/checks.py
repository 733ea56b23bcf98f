"""The comparison that the tests of the fused loss on one rank share."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from prune_opd.config import GateConfig, ObjectiveConfig, WeightingConfig
from prune_opd.loss import GateStats
from tests.reference import NO_WEIGHTING, Case


def assert_agrees(
    case: Case,
    gate: GateConfig | None,
    objective: ObjectiveConfig,
    dtype: torch.dtype = torch.float64,
    tolerance: float = 1e-9,
    weighting: WeightingConfig = NO_WEIGHTING,
    **more: Any,
) -> GateStats:
    """Value, both gradients and every statistic; tolerances are relative to the largest entry of the reference."""
    ours, plain = case.leaves(dtype), case.leaves(dtype).leaves(torch.float64)
    loss, count, stats = ours.fused(gate, objective, weighting, **more)
    reference = plain.reference(gate, objective, weighting)
    (3 * loss).backward()  # the caller scales the sum
    (3 * reference.loss_sum).backward()

    def close(got: Tensor, expected: Tensor | list[float]) -> None:
        expected = torch.as_tensor(expected, dtype=torch.float64)
        assert got.shape == expected.shape
        scale = max(expected.abs().max().item(), 1e-3) if expected.numel() else 1.0
        assert ((got.double() - expected).abs() <= tolerance * scale).all(), (got.double() - expected).abs().max()

    assert count == len(case.sampled)
    assert loss.dtype == dtype and loss.shape == ()
    close(loss, reference.loss_sum.detach())
    for got, expected in zip(ours.gradients(), plain.gradients(), strict=True):
        assert got.dtype == dtype
        close(got, expected)
    assert stats.overlap_N.dtype == torch.float32
    assert stats.overlap_N.tolist() == pytest.approx(reference.overlap)
    assert stats.event_N.tolist() == reference.event
    assert stats.reliable_length_B.tolist() == reference.reliable_length
    assert stats.length_B.tolist() == reference.length
    close(stats.reliability_N, reference.reliability)
    close(stats.weight_N, reference.weight)
    close(stats.sampled_logp_N, reference.sampled_logp)
    close(stats.divergence_N, reference.divergence)
    for name, expected in reference.outside.items():
        close(getattr(stats, name), expected)
    return stats
