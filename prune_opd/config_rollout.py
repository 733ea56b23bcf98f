"""Settings of the in-flight gate, and what it and partial rollouts do not go with (`TrainConfig` asks first of all)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from prune_opd.config_checks import between, one_of
from prune_opd.errors import ConfigError

if TYPE_CHECKING:
    from prune_opd.config import TrainConfig

# Two words closer than this [nats] may change places between the engine's scores and the trainer's: twice what the
# check after the first weight sync allows any token in fp32. Coarser formats have no such bound: single tokens of a
# sharp model are half a nat off, most of them far less.
MARGIN = {"fp32": 2e-3, "bf16": 0.25, "fp8": 0.5}


@dataclass(frozen=True)
class InflightConfig:
    """Stopping drifting responses while they are generated: this project's extension of Prune-OPD. Lengths in tokens.

    At checkpoints along a response the teacher scores what is there, and a response whose reliability R has reached 0
    is cut off at the checkpoint.
    """

    mode: str = "off"  # off | gate
    schedule: str = "geometric"  # checkpoints at first_check · 1, 2, 4, 8 … | fixed: first_check, then every `chunk`
    first_check: int = 256  # response length at which the teacher looks for the first time
    chunk: int = 256  # fixed: tokens between two checkpoints
    stop_events: int | None = None  # None: R has reached 0; else this many events, which may cut tokens that R > 0 has
    min_keep: int = 1  # a response that is stopped keeps at least so many: no checkpoint lies before
    # What a token of the teacher costs, in response tokens with their generation and training. Above 0 it looks only at
    # checkpoints that, by the last batches, avoid more than it reads in vain (inflight_plan.py); 0: at all of them.
    price: float = 0.0
    margin: float | None = None  # nats; None: by the format of the rollouts (MARGIN). 0: exact ties alone are undecided

    def __post_init__(self) -> None:
        one_of("rollout.inflight.mode", self.mode, ("off", "gate"))
        one_of("rollout.inflight.schedule", self.schedule, ("geometric", "fixed"))
        for name in ("first_check", "chunk", "min_keep"):
            between(f"rollout.inflight.{name}", getattr(self, name), 1)
        if self.stop_events is not None:
            between("rollout.inflight.stop_events", self.stop_events, 1)
        between("rollout.inflight.price", self.price, 0)
        if self.margin is not None:
            between("rollout.inflight.margin", self.margin, 0)

    @property
    def on(self) -> bool:
        return self.mode == "gate"

    def checkpoints(self, max_tokens: int) -> tuple[int, ...]:
        """Response lengths, ascending, at which a response of at most `max_tokens` is looked at.

        The last token that may come is no checkpoint: nothing is left to stop there.
        """
        places, at = [], self.first_check
        while at < max_tokens:
            if at >= self.min_keep:
                places.append(at)
            at = 2 * at if self.schedule == "geometric" else at + self.chunk
        return tuple(places)


def check_inflight(config: TrainConfig) -> None:
    """ConfigError where the in-flight gate could never stop anything, or would change the weight of tokens it keeps."""
    inflight, gate = config.rollout.inflight, config.gate
    if not inflight.on:
        return
    off = "or set rollout.inflight.mode=off"
    if gate is None:
        raise ConfigError(f"rollout.inflight.mode = gate with gate = null: there is no gate to stop at; set one, {off}")
    if inflight.stop_events is not None and inflight.price > 0:
        raise ConfigError(
            f"rollout.inflight.price = {inflight.price:g} with rollout.inflight.stop_events = {inflight.stop_events}: "
            "what a checkpoint is worth is known of the end of reliability alone; set price=0, or leave stop_events out"
        )
    if inflight.stop_events is None and gate.w_drop == 0:
        raise ConfigError(
            "rollout.inflight.mode = gate with gate.w_drop = 0: reliability never falls to 0; give w_drop a value, set "
            f"rollout.inflight.stop_events, {off}"
        )
    if gate.metric == "overlap" and gate.threshold == 0:
        raise ConfigError(
            "rollout.inflight.mode = gate with gate.threshold = 0: no overlap is below it, so nothing is ever stopped; "
            f"raise it, {off}"
        )
    longest = config.horizon.max_len
    if not inflight.checkpoints(longest):
        raise ConfigError(
            f"rollout.inflight.first_check = {inflight.first_check} (min_keep = {inflight.min_keep}) leaves no "
            f"checkpoint before horizon.max_len = {longest}: lower it, {off}"
        )
    needed = inflight.stop_events or (math.ceil(1 / gate.w_drop - 1e-9) if gate.w_drop else 1)
    if needed > inflight.checkpoints(longest)[-1]:
        raise ConfigError(
            f"rollout.inflight.mode = gate needs {needed} events to stop a response (gate.w_drop or stop_events), and "
            f"the last checkpoint is at token {inflight.checkpoints(longest)[-1]}: nothing is ever stopped; raise "
            f"gate.w_drop, lower rollout.inflight.stop_events, {off}"
        )
    if gate.weight_normalisation == "mean" or config.weighting.name in ("iw_opd", "tip"):
        field = (
            "gate.weight_normalisation = mean"
            if gate.weight_normalisation == "mean"
            else f"weighting.name = {config.weighting.name}"
        )
        raise ConfigError(
            f"rollout.inflight.mode = gate with {field}: weights depend on the whole response there, so a cut would "
            f"change the tokens before it; choose another, {off}"
        )


def check_long_tail(config: TrainConfig) -> None:
    """ConfigError where partial rollouts would have nothing to go on with, or no ratio to correct it by."""
    rollout = config.rollout
    if rollout.oversample > 1 and config.horizon.scatter:
        raise ConfigError(
            f"rollout.oversample = {rollout.oversample:g} with horizon.scatter = true: the responses with the shortest "
            "limits would be kept, and the cuts' mean would not be the horizon; set rollout.oversample=1"
        )
    if not rollout.partial:
        return
    if rollout.oversample == 1:
        raise ConfigError(
            "rollout.partial = true with rollout.oversample = 1: every prompt that is started is waited for, so "
            "nothing is left to go on with; raise rollout.oversample (1.25 starts a quarter more), or "
            "set rollout.partial=false"
        )
    for name, value in (
        ("objective.temperature", config.objective.temperature),
        ("rollout.temperature", rollout.temperature),
    ):
        if value != 1:
            raise ConfigError(
                f"rollout.partial = true with {name} = {value:g}: stale tokens are corrected by the ratio of both "
                f"students' probabilities at temperature 1; set {name}=1, or rollout.partial=false"
            )
