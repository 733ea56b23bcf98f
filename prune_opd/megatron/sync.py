"""The student's weights on their way into the rollout engine, and the check that the engine has them."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

from prune_opd.config import TrainConfig
from prune_opd.errors import UserError
from prune_opd.megatron.logprobs import sampled_logprobs
from prune_opd.megatron.trainer import Trainer
from prune_opd.rollout.phase import RolloutPhase
from prune_opd.rollout.request import TokenSampling, new_rows
from prune_opd.weights.stream import Resharder

PARITY_PROMPTS, PARITY_TOKENS = 4, 32
# Nats by which the log-probability of a token may differ: of any token in fp32; on average in bf16, where rounding
# alone puts single tokens of a sharp model off by half a nat, and wrong weights give several nats on average. FP8
# rollouts of the tiny pair are 0.16 off on average.
PARITY_LIMIT = {"fp32": 1e-3, "bf16": 0.1, "fp8": 0.5}


class WeightSync:
    """Reshards the student's weights into the engine of `rollout`. Every stream compares checksums of what it moves.

    The log-probabilities are compared the first time. A new run's engine has read the first weights itself, so it is
    looked at again after the second time when its model is compiled: a graph could have kept them.

    enter: told of each phase that begins, `sync` and `parity`.
    """

    def __init__(
        self, config: TrainConfig, trainer: Trainer, rollout: RolloutPhase, enter: Callable[[str], None]
    ) -> None:
        self.config, self.trainer, self.rollout, self.enter = config, trainer, rollout, enter
        self.engine_has: int | None = None  # steps after which the student had the weights that the engine has
        self._look_again = False

    @cached_property
    def resharder(self) -> Resharder:
        return Resharder(self.trainer.chunks, self.config.rollout.bucket_mb)

    def __call__(self, step: int) -> None:
        """Bring the student of after `step` steps into the engine, unless it is there. Collective over the job."""
        engine = self.rollout.engine
        self.enter("sync")
        if self.engine_has == step and engine.holds_weights:
            return
        first = self.engine_has is None
        engine.load(self.resharder.stream())
        self.engine_has = step
        if first or self._look_again:
            self._look_again = first and engine.compiled
            self.enter("parity")
            self.check_parity()

    def check_parity(self) -> None:
        """The engine and the trainer must give the same tokens the same log-probability, or the rollouts are not ours.

        Raises `UserError` naming the difference and the limit.
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
