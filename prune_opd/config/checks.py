"""The checks that the config dataclasses make of their own values. Each raises `ConfigError`: field, value, remedy."""

from __future__ import annotations

import math
from typing import Any

from prune_opd.errors import ConfigError


def one_of(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ConfigError(f"{name} = {value!r} is not known: choose one of {', '.join(choices)}")


def between(
    name: str, value: float, low: float, high: float = math.inf, *, open_low: bool = False, open_high: bool = False
) -> None:
    inside = (low < value if open_low else low <= value) and (value < high if open_high else value <= high)
    if not inside or math.isnan(value):
        bound = f"{'above' if open_low else 'at least'} {low:g}"
        if high != math.inf:
            bound += f" and {'below' if open_high else 'at most'} {high:g}"
        raise ConfigError(f"{name} = {value!r} is out of range: give a number {bound}")


def required(name: str, value: Any, why: str) -> None:
    if value is None:
        raise ConfigError(f"{name} is not set: {why}")
