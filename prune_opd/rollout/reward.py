"""Rewards of a step's responses, and what each of their tokens gets of them.

    Rollouts ─▶ texts ─▶ rank 0: the source's scorer, or a function of the user's ─▶ all: rewards ─▶ advantages

Rank 0 alone scores, so that a function need not give the same twice, and a failure is every rank's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from prune_opd.config import RewardConfig, TrainConfig
from prune_opd.data.files import FileSource
from prune_opd.data.prompt import Prompt, PromptSource, Tokenizer
from prune_opd.data.prompts import sources
from prune_opd.data.sampler import Sampler
from prune_opd.errors import ConfigError, UserError
from prune_opd.method.advantage import advantages, equal_groups
from prune_opd.rollout.batch import Rollouts

LARGEST = 1e6  # of a reward, of either sign: what is far beyond would be an infinite loss in the end


@dataclass(frozen=True)
class Rewards:
    """Of one step. reward_B: None for a response without one. advantage_B: with `coef` in it. failed: first failure."""

    reward_B: tuple[float | None, ...]
    advantage_B: tuple[float, ...]
    responses: int
    failed: int

    def record(self) -> dict[str, Any]:
        """Their part of a step record; the mean is null where no response was scored."""
        known = [reward for reward in self.reward_B if reward is not None]
        mean = math.fsum(known) / len(known) if known else None
        variance = math.fsum((reward - mean) ** 2 for reward in known) / len(known) if mean is not None else None
        return {
            "reward": mean,
            "reward_std": None if variance is None else math.sqrt(variance),
            "reward_scored": len(known) / max(len(self.reward_B), 1),
            "reward_equal_groups": equal_groups(self.reward_B, self.responses),
            "reward_failed": self.failed,
        }


class RewardModel:
    """Scores the responses of one step after the other. sources: of the prompts, by name."""

    def __init__(
        self, config: RewardConfig, responses: int, tokenizer: Tokenizer, sources: Mapping[str, PromptSource]
    ) -> None:
        self._config, self._responses, self._tokenizer, self._sources = config, responses, tokenizer, sources
        self._function = config.function() or self._right

    def __call__(self, rollouts: Rollouts) -> Rewards:
        """Collective over the job. Raises `UserError` on all ranks when more than `max_failed` of them fail."""
        given: list[Any] = [self._score_or_say(rollouts) if dist.get_rank() == 0 else None]
        dist.broadcast_object_list(given)
        if isinstance(given[0], str):
            raise UserError(given[0])
        reward_B, failures = given[0]
        if len(failures) > self._config.max_failed * len(reward_B):
            raise UserError(
                f"reward.name = {self._config.name}: {len(failures)} of {len(reward_B)} responses have failed, "
                f"reward.max_failed = {self._config.max_failed:g}; the first: {failures[0]}. Mend the function, or "
                "raise reward.max_failed"
            )
        found = advantages(reward_B, self._responses, self._config.normalise)
        return Rewards(
            tuple(reward_B),
            tuple(self._config.coef * value for value in found),
            self._responses,
            len(failures),
        )

    def _score_or_say(self, rollouts: Rollouts) -> tuple[list[float | None], list[str]] | str:
        """As `_score`, or why there are none: were rank 0 to end here, the others would wait for it."""
        try:
            return self._score(rollouts)
        except (Exception, SystemExit) as error:
            return f"reward.name = {self._config.name}: {type(error).__name__}: {error}; mend the function"

    def _score(self, rollouts: Rollouts) -> tuple[list[float | None], list[str]]:
        """Rewards by row, and what was wrong with those that failed."""
        rewards: list[float | None] = [None] * len(rollouts.responses)
        failures: list[str] = []
        texts = self._tokenizer.batch_decode([list(ids) for ids in rollouts.response_ids], skip_special_tokens=True)
        for row, (prompt, response, text) in enumerate(zip(rollouts.prompts, rollouts.responses, texts, strict=True)):
            if self._config.only_if_finished and not response.finished:
                continue
            try:
                reward = float(self._function(text, prompt))
                if not abs(reward) <= LARGEST:
                    raise ValueError(f"the reward is {reward:g}, no number up to {LARGEST:g}")
                rewards[row] = reward
            except Exception as error:
                what = f"{type(error).__name__}: {error}"
                failures.append(f"row {row}, prompt {prompt.index} of {prompt.source}: {what}; response {text[:80]!r}")
        return rewards, failures

    def _right(self, text: str, prompt: Prompt) -> float:
        if prompt.answer is None:
            raise ValueError("the prompt has no answer to score against")
        return float(self._sources[prompt.source].score(text, prompt))


def make_reward(config: TrainConfig, tokenizer: Tokenizer, sampler: Sampler) -> RewardModel | None:
    """The run's reward, if it has one. ConfigError: no such function, or rows without the answers that it needs."""
    if not config.reward.on:
        return None
    return RewardModel(config.reward, config.rollout.responses, tokenizer, _scorers(config, sampler))


def _scorers(config: TrainConfig, sampler: Sampler) -> dict[str, PromptSource]:
    """By the name that a prompt has of its source: rows of files may name another, and are scored alike."""
    found = sources(sampler)
    tasks: dict[str, PromptSource] = {source.name: source for source in found if not isinstance(source, FileSource)}
    by_name = dict(tasks)
    for source in found if config.reward.name == "answer" else ():
        if isinstance(source, FileSource):
            source.need_answers("a response cannot be scored", "or set reward.name=none")
            names = {prompt.source for prompt in source.prompts}
            if taken := sorted(names & tasks.keys()):
                raise ConfigError(
                    f'{source.path} has rows with "source": {taken[0]!r}, as the task in data.mixture is called, which '
                    "is scored in another way: rename them"
                )
            by_name |= dict.fromkeys(names, source)
    return by_name
