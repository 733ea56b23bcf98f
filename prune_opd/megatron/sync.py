"""The student's weights on their way into the rollout engine, and the check that the engine has them."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

from prune_opd.config import TrainConfig
from prune_opd.config.rollout import MISMATCH_LIMIT
from prune_opd.errors import UserError
from prune_opd.megatron.logprobs import sampled_logprobs
from prune_opd.megatron.trainer import Trainer
from prune_opd.rollout.phase import RolloutPhase
from prune_opd.rollout.request import TokenSampling, new_rows
from prune_opd.weights.stream import Resharder

PARITY_PROMPTS, PARITY_TOKENS = 4, 32
# Nats by which the log-probability of a token may differ: of any token in fp32, on average in coarser formats.
PARITY_LIMIT = MISMATCH_LIMIT


class WeightSync:
    """Reshards the student's weights into the engine of `rollout`. Every stream compares checksums of what it moves.

    The log-probabilities are compared after the first two loads, and then whenever `rollout.parity_every` steps have
    passed. The second load is one of its own: a new run's engine has read the first weights itself, a compiled graph
    could have kept them, and an engine that repacks experts or quantises may do so only once.

    enter: told of each phase that begins, `sync` and `parity`.
    """

    def __init__(
        self, config: TrainConfig, trainer: Trainer, rollout: RolloutPhase, enter: Callable[[str], None]
    ) -> None:
        self.config, self.trainer, self.rollout, self.enter = config, trainer, rollout, enter
        self.engine_has: int | None = None  # steps after which the student had the weights that the engine has
        self._loads = 0
        self._compared: int | None = None  # steps after which the log-probabilities were compared

    @cached_property
    def resharder(self) -> Resharder:
        return Resharder(self.trainer.chunks, self.config.rollout.bucket_mb)

    def __call__(self, step: int) -> None:
        """Bring the student of after `step` steps into the engine, unless it is there. Collective over the job."""
        engine = self.rollout.engine
        self.enter("sync")
        if self.engine_has == step and engine.holds_weights:
            return
        self._loads = 1 if self.engine_has is None else self._loads + 1
        engine.load(self.resharder.stream())
        self.engine_has = step
        every, since = self.config.rollout.parity_every, step - (self._compared or 0)
        if self._loads <= 2 or (every and since >= every):
            self._compared = step
            self.enter("parity")
            self.check_parity()

    def check_parity(self) -> float:
        """The engine and the trainer must give the same tokens the same log-probability, or the rollouts are not ours.

        Returns the difference [nats]. Raises `UserError` naming it and the limit.
        """
        config, engine, trainer = self.config, self.rollout.engine, self.trainer
        # At least one for each engine: a reload can fail on one of them alone.
        source, count = self.rollout.sampler.source, max(PARITY_PROMPTS, engine.engines)
        prompts = [source.get(i % (source.size or count)) for i in range(count)]
        sampling = TokenSampling(config.seed, step=0, temperature=config.objective.temperature, logprobs=True)
        rollouts = engine.generate(new_rows(prompts, 1, PARITY_TOKENS), sampling)
        ours = sampled_logprobs(trainer.chunks, rollouts, trainer.layout, trainer.device)
        theirs = [logprob for response in rollouts.responses for logprob in response.logprobs or ()]
        differences = [abs(a - b) for a, b in zip(ours, theirs, strict=True)]
        precision = config.rollout.coarsest_format(config.precision.params)
        found = max(differences) if precision == "fp32" else sum(differences) / len(differences)
        if not found <= PARITY_LIMIT[precision]:
            raise UserError(
                f"after a weight sync the rollout engine and the trainer differ by {found:.2e} nats in the "
                f"log-probability of a token (limit in {precision}: {PARITY_LIMIT[precision]:g}): "
                "the weights in the engine are not the student's"
            )
        return found
