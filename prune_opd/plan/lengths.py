"""How long responses are, and how far the horizon lets them go. Assumed: a run's metrics have the measurements."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist

from prune_opd.config import HorizonConfig, TrainConfig
from prune_opd.errors import ConfigError
from prune_opd.horizon import make_controller

SPREAD = (
    0.6  # standard deviation of the logarithm of a response's length: a few times as long as the median now and then
)
DEFAULT_SHARE = 0.6  # of max_len, where the recipe does not say what a response takes
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
        normal = NormalDist()
        return [min(horizon, self.median * math.exp(SPREAD * normal.inv_cdf((i + 0.5) / count))) for i in range(count)]

    def mean(self, horizon: float) -> float:
        return sum(self.quantiles(CURVE, horizon)) / CURVE


def lengths_of(config: TrainConfig) -> Lengths:
    planned = config.planning.response_length
    return Lengths.of(
        planned if planned is not None else DEFAULT_SHARE * config.horizon.max_len, config.horizon.max_len
    )


def mean_horizon(config: TrainConfig) -> float:
    """Of the run [tokens]. Exact but for prune, whose window nobody knows before: planning.mean_horizon, or a guess."""
    horizon = config.horizon
    if horizon.strategy == "prune":
        if config.planning.mean_horizon is not None:
            return min(config.planning.mean_horizon, horizon.max_len)
        return (max(horizon.init_len or 0, horizon.min_len) + horizon.max_len) / 2
    return _scheduled(horizon, config.steps)


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
    if config.horizon.strategy == "prune":
        source = "planning.mean_horizon" if planning.mean_horizon else "between horizon.init_len and max_len"
        lines.append(f"window: {mean_horizon(config):.0f} tokens on average ({source})")
    return lines


def _scheduled(horizon: HorizonConfig, steps: int) -> float:
    """The mean of a controller that does not look at the responses: full, topd, popd."""
    controller, total = make_controller(horizon), 0
    for _ in range(steps):
        total += controller.horizon
        controller.update([], [], [])
    return total / steps
