"""The rollout phase of a step: prompts, the engine, and what goes on from one step to the next."""

from __future__ import annotations

from collections.abc import Callable

from prune_opd.config import TrainConfig
from prune_opd.data.prompt import Prompt
from prune_opd.data.sampler import Sampler
from prune_opd.rollout.batch import Rollouts
from prune_opd.rollout.engine import RolloutEngine
from prune_opd.rollout.long_tail import LongTail, taught_by
from prune_opd.rollout.request import TokenSampling
from prune_opd.rollout.stepwise import Watch


class RolloutPhase:
    """Makes the rollouts of one step after the other."""

    def __init__(self, config: TrainConfig, engine: RolloutEngine, sampler: Sampler) -> None:
        self.config, self.engine, self.sampler = config, engine, sampler
        self.long_tail = LongTail(config.rollout, sampler.endless, taught_by(config))
        # (horizon, responses, step) → most tokens of each response
        self.limits: Callable[[int, int, int], list[int]] = lambda horizon, responses, step: [horizon] * responses

    def generate(
        self,
        horizon: int,
        step: int,
        watch: Watch | None = None,
        limit_of: Callable[[Prompt], int] | None = None,
    ) -> Rollouts:
        """The rollouts of step number `step`: of the groups that wait from the step before, and of new prompts.

        With `rollout.refresh_every` those that an earlier step has generated, or these and the next ones'.

        horizon: most tokens of a response. watch: stops responses on the way. limit_of: the horizon of a prompt's own
        teacher, where there are several. Collective over the job.
        """
        config, settings = self.config, self.config.rollout
        if self.long_tail.stocked:
            return self.long_tail.reuse()
        ahead = self.long_tail.ahead(step, config.steps)
        groups = [group for _ in range(ahead) for group in self.long_tail.next(self.sampler)]
        limits = self.limits(horizon, len(groups) * settings.responses, step)
        if limit_of is not None:
            limits = [limit_of(group.prompt) for group in groups for _ in range(settings.responses)]
        sampling = TokenSampling(
            config.seed,
            step,
            settings.temperature,
            settings.top_p,
            settings.logprobs or settings.partial or settings.reuses,
        )
        rows, race = self.long_tail.rows(groups, limits), self.long_tail.race(groups)
        rollouts = self.engine.generate(rows, sampling, race, watch)
        if ahead > 1:
            rollouts = rollouts.split(range(settings.prompts), settings.responses)
        self.long_tail.take(rollouts)
        return rollouts
