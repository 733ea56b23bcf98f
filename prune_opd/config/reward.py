"""Settings of a task reward beside distillation."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from prune_opd.config.checks import Checked, Positive, Share
from prune_opd.errors import ConfigError

PYTHON = "python:"


@dataclass(frozen=True)
class RewardConfig(Checked, name="reward"):
    """A task reward beside distillation: its policy gradient on the sampled tokens is added to the gated loss.

    The distillation part stays as it is. The gate weighs it and not the reward (method/advantage.py).
    """

    # none | answer: 1 for a right answer, 0 else, by the prompt source's own scorer (mathematics for files, the task's
    # for the ledger and reasoning-gym) | python:MODULE:FUNCTION: a number of yours (docs/rewards.md)
    name: str = "none"
    coef: Positive = 1.0  # of the reward's term; the distillation's has 1
    # what a token's advantage is: group: (reward − mean) / standard deviation over a prompt's responses | batch: over
    # all responses of the step | none: the reward itself
    normalise: Literal["group", "batch", "none"] = "group"
    # a response that was cut, by the horizon or in flight, has no reward and no part in any mean; false: it is scored
    # as it stands
    only_if_finished: bool = True
    max_failed: Share = 0.1  # of a step's responses whose reward raises or is no number; more end the run

    def __post_init__(self) -> None:
        super().__post_init__()
        module, _, function = self.name.removeprefix(PYTHON).partition(":")
        named = self.name.startswith(PYTHON) and module and function.isidentifier()
        if self.name not in ("none", "answer") and not named:
            raise ConfigError(f"reward.name = {self.name!r}: give none, answer or {PYTHON}MODULE:FUNCTION")

    def function(self) -> Callable[[str, Any], float] | None:
        """What `python:` names: (response text, its `Prompt`) → reward; None for another reward.

        ConfigError if it cannot be imported, or is no function.
        """
        if not self.name.startswith(PYTHON):
            return None
        module, _, name = self.name.removeprefix(PYTHON).partition(":")
        try:
            found = getattr(importlib.import_module(module), name)
        except Exception as error:
            raise ConfigError(
                f"reward.name = {self.name!r}: {type(error).__name__}: {error}; give the module as Python imports it "
                "(its folder in PYTHONPATH) and a function in it"
            ) from error
        if not callable(found):
            raise ConfigError(f"reward.name = {self.name!r} is {type(found).__name__} and no function: name a function")
        return found

    @property
    def on(self) -> bool:
        return self.name != "none"
