"""The assumed lengths: their mean is the one that was asked for, and a shorter horizon cuts them."""

from __future__ import annotations

from dataclasses import replace

import pytest

from prune_opd.config import TrainConfig
from prune_opd.config.overrides import apply_overrides
from prune_opd.config.recipe import load_recipe
from prune_opd.errors import ConfigError
from prune_opd.plan.lengths import Lengths, assumptions, mean_horizon


def recipe(*overrides: str) -> TrainConfig:
    config = load_recipe("r1_1_5b_from_justrl_8xh100")
    assert isinstance(config, TrainConfig)
    return apply_overrides(config, list(overrides))


@pytest.mark.parametrize("mean", [200, 5500, 11900])
def test_the_mean_is_the_one_that_was_asked_for(mean: int) -> None:
    lengths = Lengths.of(mean, 12288)
    assert lengths.mean(12288) == pytest.approx(mean, rel=1e-6)
    assert max(lengths.quantiles(256, 12288)) <= 12288


def test_a_shorter_horizon_cuts_the_mean_and_never_lengthens_it() -> None:
    lengths = Lengths.of(5500, 12288)
    means = [lengths.mean(horizon) for horizon in (1024, 2048, 4096, 12288)]
    assert means == sorted(means)
    assert means[0] == pytest.approx(1024, rel=0.01)


def test_a_mean_at_the_limit_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"planning.response_length = 12288 is no mean"):
        Lengths.of(12288, 12288)


@pytest.mark.parametrize(
    ("overrides", "horizon"),
    [
        (["horizon.strategy=full"], 12288),
        (["horizon.strategy=topd", "horizon.rho=0.25"], 3072),
        (["horizon.strategy=popd", "steps=16"], 1024 + 256),  # eight steps at init_len, eight 512 tokens later
        (["horizon.strategy=prune", "planning.mean_horizon=3000"], 3000),
        (["horizon.strategy=prune", "planning.mean_horizon=null"], (1024 + 12288) / 2),
    ],
)
def test_the_mean_horizon_is_the_controllers(overrides: list[str], horizon: float) -> None:
    assert mean_horizon(recipe(*overrides)) == horizon


def test_what_is_assumed_is_said() -> None:
    config = recipe()
    assert any("5500 tokens" in line for line in assumptions(config))
    unset = replace(config, planning=replace(config.planning, response_length=None, mean_horizon=None))
    assert any("60% of horizon.max_len" in line for line in assumptions(unset))
    assert any("horizon.init_len and max_len" in line for line in assumptions(unset))
