"""A whole run: its data, evaluation, checkpoints and tracking, and what does not go together."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any

from prune_opd.config.checks import between, one_of
from prune_opd.config.method import GateConfig, HorizonConfig, ObjectiveConfig, WeightingConfig
from prune_opd.config.rollout import RolloutConfig
from prune_opd.config.training import MemoryConfig, OptimizerConfig, ParallelConfig, PrecisionConfig
from prune_opd.errors import ConfigError

GPUS = ("cpu", "a100", "h100", "h200")


@dataclass(frozen=True)
class DataConfig:
    """Where prompts come from and how rows of files become prompts (data/ has the formats)."""

    source: str = "ledger"  # ledger | reasoning_gym/TASK | a .jsonl or .parquet file | a dataset directory
    mixture: tuple[str, ...] = ()  # several sources instead, in the proportions of `weights`
    weights: tuple[float, ...] = ()  # of the mixture's sources; none: equal ones
    min_steps: int = 20  # ledger: bookings per problem
    max_steps: int = 40  # likewise, the most
    shuffle: bool = True  # a file's rows, in another order each epoch
    split: str | None = None  # of a dataset directory that has several; null: train
    chat: bool | None = None  # files: through the chat template; null: "messages", "problem", "question", not "prompt"
    system_prompt: str | None = None  # before the turns, where the chat template is used
    suffix: str = ""  # after the last user turn, or after the prompt
    thinking: bool | None = None  # the chat template's switch, where it has one
    bad_rows: str = "refuse"  # of a file: refuse (with their line numbers) | skip (and say how many, and where)

    def __post_init__(self) -> None:
        one_of("data.bad_rows", self.bad_rows, ("refuse", "skip"))
        between("data.min_steps", self.min_steps, 1, 40)
        between("data.max_steps", self.max_steps, self.min_steps, 40)
        if self.weights and len(self.weights) != len(self.mixture):
            raise ConfigError(
                f"data.weights has {len(self.weights)} numbers and data.mixture {len(self.mixture)} sources: give one "
                "weight for each source, or leave data.weights out"
            )
        if any(weight <= 0 for weight in self.weights):
            raise ConfigError(
                f"data.weights = {list(self.weights)}: every weight is above 0; leave a source out instead"
            )

        for name in ("chat", "system_prompt", "suffix", "thinking") if "ledger" in self.sources else ():
            if (value := getattr(self, name)) != getattr(DataConfig, name):
                raise ConfigError(f"data.{name} = {value!r}: the ledger's problems are complete texts; leave it out")

    @property
    def sources(self) -> tuple[str, ...]:
        """What the prompts are drawn from."""
        return self.mixture or (self.source,)


@dataclass(frozen=True)
class EvalConfig:
    """Accuracy on held-out problems, sampled by the rollout engine. `every` = 0: only before and after the run."""

    every: int = 0  # steps; 0: only before and after the run
    problems: int = 256  # of each task; 0: no evaluation
    samples: int = 1  # avg@samples
    temperature: float = 1.0  # of the sampling; 0: greedy
    top_p: float = 1.0  # the sampling's nucleus; the papers have 0.95
    max_len: int | None = None  # None: horizon.max_len
    seed: int = 777  # of the problems and of the sampling, the same at every evaluation
    sources: tuple[str, ...] = ()  # tasks and files with answers, as data.source; none: the training source, held out
    generations: int = 64  # answers of each task that every evaluation leaves in generations/

    def __post_init__(self) -> None:
        between("evaluation.generations", self.generations, 0)
        between("evaluation.every", self.every, 0)
        between("evaluation.problems", self.problems, 0)
        between("evaluation.samples", self.samples, 1)
        between("evaluation.temperature", self.temperature, 0)
        between("evaluation.top_p", self.top_p, 0, 1, open_low=True)
        if self.max_len is not None:
            between("evaluation.max_len", self.max_len, 1)


@dataclass(frozen=True)
class CheckpointConfig:
    """When checkpoints are written and which of them stay (megatron/checkpoint.py has the format)."""

    every: int = 50  # steps; 0: only at the end
    keep: int = 2  # newest checkpoints that stay on disk
    keep_every: int = 0  # checkpoints of these steps stay for good: 100, 200 …; 0: none does
    asynchronous: bool = True  # a child process writes while the next steps run; False: the run waits for the disk
    last: bool = True  # save after the last step; without it the run cannot be resumed or exported later
    export_hf: bool = True  # write hf/ at the end of the run

    def __post_init__(self) -> None:
        between("checkpoint.every", self.every, 0)
        between("checkpoint.keep", self.keep, 1)
        between("checkpoint.keep_every", self.keep_every, 0)


@dataclass(frozen=True)
class SurvivalConfig:
    """What a run puts up with (ranks/signals.py)."""

    max_skipped: int = 3  # updates in a row whose loss or gradient is not finite: so many end the run
    watchdog_minutes: float = 30.0  # of one phase: a longer one ends the run with the stacks of all ranks; 0: never

    def __post_init__(self) -> None:
        between("survival.max_skipped", self.max_skipped, 1)
        between("survival.watchdog_minutes", self.watchdog_minutes, 0)


@dataclass(frozen=True)
class TrackConfig:
    """metrics.jsonl is always there; this is what else a run leaves of its progress."""

    wandb: str = "offline"  # offline | online | disabled
    project: str = "prune-opd"  # wandb's
    tensorboard: bool = False  # event files in tensorboard/ of the run directory, too
    position_bins: int = 16  # resolution of the overlap-by-position curves
    samples: int = 4  # responses of a sampled step that are kept token by token in samples.jsonl; 0: none
    samples_every: int = 10  # steps from one sampled step to the next; the first and the last one always are
    report: bool = True  # write report.html at the end

    def __post_init__(self) -> None:
        one_of("track.wandb", self.wandb, ("offline", "online", "disabled"))
        between("track.position_bins", self.position_bins, 1)
        between("track.samples", self.samples, 0)
        between("track.samples_every", self.samples_every, 1)


@dataclass(frozen=True)
class PlanningConfig:
    """What a plan assumes; it changes nothing in a run."""

    gpu: str = "cpu"  # what the recipe is made for: cpu | a100 | h100 | h200
    nodes: int = 1  # of parallel.nproc ranks each
    response_length: int | None = None  # mean tokens at the full horizon (`response_length` of a run's metrics)
    mean_horizon: int | None = None  # prune: the window's mean over the run (`horizon` of a run's metrics)

    def __post_init__(self) -> None:
        one_of("planning.gpu", self.gpu, GPUS)
        between("planning.nodes", self.nodes, 1)
        for name in ("response_length", "mean_horizon"):
            if getattr(self, name) is not None:
                between(f"planning.{name}", getattr(self, name), 1)


@dataclass(frozen=True)
class TrainConfig:
    """One Prune-OPD run. `student` and `teacher` are Hugging Face directories with the same tokenizer."""

    name: str  # of the run: runs/NAME is its directory
    student: str  # a Hugging Face directory
    teacher: str  # a Hugging Face directory
    steps: int  # of training; the schedule of the learning rate ends there
    horizon: HorizonConfig
    gate: GateConfig | None = field(default_factory=GateConfig)  # None: plain OPD, every token at weight 1
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    weighting: WeightingConfig = field(default_factory=WeightingConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    evaluation: EvalConfig = field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    survival: SurvivalConfig = field(default_factory=SurvivalConfig)
    track: TrackConfig = field(default_factory=TrackConfig)
    planning: PlanningConfig = field(default_factory=PlanningConfig)
    seed: int = 0  # of prompts, prompt order and sampling
    stop_after: int | None = (
        None  # save and stop after this step (a time-boxed job); the schedule stays that of `steps`
    )

    def __post_init__(self) -> None:
        between("steps", self.steps, 1)
        if self.stop_after is not None:
            between("stop_after", self.stop_after, 1)
        if self.gate is None and self.horizon.strategy in ("prune", "marginal"):
            raise ConfigError(
                f"gate = null with horizon.strategy = {self.horizon.strategy}: the window follows the gate's reliable "
                "length; "
                "set a gate or another strategy"
            )
        check_inflight(self)
        check_long_tail(self)


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


def to_dict(config: Any) -> dict[str, Any]:
    """The plain nested dictionary of a config, as it is written to config.yaml."""
    return dataclasses.asdict(config)
