"""How long responses are, and how far the horizon lets them go. All assumed; measurements are in a run's metrics."""

from __future__ import annotations

import math
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import lru_cache
from statistics import NormalDist

from prune_opd.config import HorizonConfig, TrainConfig
from prune_opd.errors import ConfigError
from prune_opd.method.horizon import make_controller

# Standard deviation of the logarithm of a response's length: now and then one is a few times as long as the median.
SPREAD = 0.6
DEFAULT_SHARE = 0.6  # mean response length as a share of max_len, where the recipe gives none
ADAPTIVE = ("prune", "marginal", "adwin", "fastopd")
COMPARED = ("prune", "popd", "topd", "full")  # strategies whose times stand beside each other in a plan
CURVE = 64  # quantiles that stand for the distribution


@dataclass(frozen=True)
class Lengths:
    """Log-normal lengths [tokens] of responses that nothing cuts short."""

    median: float

    @classmethod
    def of(cls, mean: float, max_len: int) -> Lengths:
        """The lengths whose mean is `mean` when cut at `max_len` tokens. `ConfigError` if that is impossible."""
        if not 1 <= mean < max_len:
            raise ConfigError(
                f"planning.response_length = {mean:g} is no mean of responses of at most horizon.max_len = {max_len} "
                "tokens: set it below that"
            )
        low, high = 0.0, 20.0 + math.log(max_len)
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (low, middle) if cls(math.exp(middle)).mean(max_len) > mean else (middle, high)
        return cls(math.exp(high))

    def quantiles(self, count: int, horizon: float) -> list[float]:
        """Typical lengths of `count` responses cut at the horizon, ascending: quantiles (i + 1/2) / count."""
        return [min(horizon, self.median * factor) for factor in _factors(count)]

    def mean(self, horizon: float) -> float:
        return sum(self.quantiles(CURVE, horizon)) / CURVE


@lru_cache(maxsize=256)
def _factors(count: int) -> tuple[float, ...]:
    """Quantiles (i + 1/2) / count of the lengths, as multiples of the median."""
    normal = NormalDist()
    return tuple(math.exp(SPREAD * normal.inv_cdf((i + 0.5) / count)) for i in range(count))


def mean_horizon(config: TrainConfig) -> float:
    """The mean of the horizon over the run's steps [tokens]."""
    steps = steps_by_horizon(config)
    return sum(horizon * count for horizon, count in steps.items()) / sum(steps.values())


def steps_by_horizon(config: TrainConfig) -> dict[float, int]:
    """How many steps of the run have each horizon [tokens]. Exact for strategies that ignore the responses.

    The horizons of the adaptive strategies are not known before: all steps get planning.mean_horizon, or a guess.
    """
    horizon = config.horizon
    if horizon.strategy not in ADAPTIVE:
        return _schedule(horizon, config.steps)
    if config.planning.mean_horizon is not None:
        return {min(config.planning.mean_horizon, horizon.max_len): config.steps}
    return {(max(horizon.init_len or 0, horizon.min_len) + horizon.max_len) / 2: config.steps}


def strategies(config: TrainConfig) -> dict[str, TrainConfig]:
    """The recipe with its own strategy, then with each other that it has all settings for, full rollouts last."""
    found = {config.horizon.strategy: config}
    for name in COMPARED:
        with suppress(ConfigError):  # a setting is missing
            found.setdefault(name, replace(config, horizon=replace(config.horizon, strategy=name)))
    return found


def assumptions(config: TrainConfig) -> list[str]:
    """What the plan assumes about this recipe's responses, a line each."""
    planning, lines = config.planning, []
    if planning.response_length is None:
        lines.append(
            f"responses: {DEFAULT_SHARE:.0%} of horizon.max_len on average (planning.response_length is not set)"
        )
    else:
        lines.append(
            f"responses: {planning.response_length} tokens on average at the full horizon (planning.response_length)"
        )
    if "prune" in strategies(config):
        source = "planning.mean_horizon" if planning.mean_horizon else "between horizon.init_len and max_len"
        window = mean_horizon(strategies(config)["prune"])
        lines.append(f"window of prune: {window:.0f} tokens on average ({source})")
    if config.teachers:
        lines.append("teachers: each has the share of its sources in the data, and the run's horizon")
    return lines


def _schedule(horizon: HorizonConfig, steps: int) -> dict[float, int]:
    """`steps_by_horizon` of a controller that ignores the responses: full, topd, popd."""
    controller, found = make_controller(horizon), Counter[float]()
    for _ in range(steps):
        found[controller.horizon] += 1
        controller.update([], [], [])
    return dict(found)
