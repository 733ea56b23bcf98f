"""How long responses are, and how far the horizon lets them go. Assumed: a run's metrics have the measurements."""

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

SPREAD = (
    0.6  # standard deviation of the logarithm of a response's length: a few times as long as the median now and then
)
DEFAULT_SHARE = 0.6  # of max_len, where the recipe does not say what a response takes
ADAPTIVE = ("prune", "marginal")
COMPARED = ("prune", "popd", "topd", "full")  # strategies whose times stand beside each other in a plan
CURVE = 64  # quantiles that a mean is taken over


@dataclass(frozen=True)
class Lengths:
    """Log-normal lengths of responses that nothing cuts short. median in tokens."""

    median: float

    @classmethod
    def of(cls, mean: float, max_len: int) -> Lengths:
        """Those whose mean is `mean` once they are cut at `max_len` tokens. Raises `ConfigError` if there are none."""
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
        """The lengths of `count` responses cut at the horizon, ascending: the middles of as many equal shares."""
        return [min(horizon, self.median * factor) for factor in _factors(count)]

    def mean(self, horizon: float) -> float:
        return sum(self.quantiles(CURVE, horizon)) / CURVE


@lru_cache(maxsize=256)
def _factors(count: int) -> tuple[float, ...]:
    """Of the median, at the middles of as many equal shares."""
    normal = NormalDist()
    return tuple(math.exp(SPREAD * normal.inv_cdf((i + 0.5) / count)) for i in range(count))


def lengths_of(config: TrainConfig) -> Lengths:
    planned = config.planning.response_length
    return Lengths.of(
        planned if planned is not None else DEFAULT_SHARE * config.horizon.max_len, config.horizon.max_len
    )


def mean_horizon(config: TrainConfig) -> float:
    """Of the run [tokens]: of `windows`."""
    found = windows(config)
    return sum(horizon * count for horizon, count in found.items()) / sum(found.values())


def windows(config: TrainConfig) -> dict[float, int]:
    """Horizon → steps of the run that have it. Exact where the schedule does not look at the responses.

    Of the adaptive strategies nobody knows the window before: all steps get planning.mean_horizon, or a guess.
    """
    horizon = config.horizon
    if horizon.strategy not in ADAPTIVE:
        return _schedule(horizon, config.steps)
    if config.planning.mean_horizon is not None:
        return {min(config.planning.mean_horizon, horizon.max_len): config.steps}
    return {(max(horizon.init_len or 0, horizon.min_len) + horizon.max_len) / 2: config.steps}


def strategies(config: TrainConfig) -> dict[str, TrainConfig]:
    """The recipe's own strategy, then the others that it has all settings for, full rollouts last."""
    found = {config.horizon.strategy: config}
    for name in COMPARED:
        with suppress(ConfigError):  # a setting is missing
            found.setdefault(name, replace(config, horizon=replace(config.horizon, strategy=name)))
    return found


def assumptions(config: TrainConfig) -> list[str]:
    """What the plan takes for granted of this recipe's responses, a line each."""
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
    return lines


def _schedule(horizon: HorizonConfig, steps: int) -> dict[float, int]:
    """Of a controller that does not look at the responses: full, topd, popd."""
    controller, found = make_controller(horizon), Counter[float]()
    for _ in range(steps):
        found[controller.horizon] += 1
        controller.update([], [], [])
    return dict(found)
