"""A whole run: its evaluation, checkpoints and tracking, and what does not go together."""

from __future__ import annotations

import dataclasses
import math
import re
from dataclasses import dataclass, field
from typing import Any, Literal

from prune_opd.config.checks import Checked, Count, CountOrZero, PositiveOrZero, ShareAboveZero
from prune_opd.config.data import DataConfig
from prune_opd.config.elsewhere import (
    TeacherCacheConfig,
    TeacherServerConfig,
    check_moving_teacher,
    check_teacher_cache,
    check_teacher_server,
)
from prune_opd.config.lora import LoraConfig
from prune_opd.config.method import GateConfig, HorizonConfig, ObjectiveConfig, WeightingConfig
from prune_opd.config.reward import RewardConfig
from prune_opd.config.rollout import MISMATCH_LIMIT, RolloutConfig
from prune_opd.config.teacher import EMA, STUDENT, TeacherEmaConfig, check_own_teacher
from prune_opd.config.teachers import TeacherConfig, alone, check_teachers
from prune_opd.config.track import PlanningConfig, TrackConfig
from prune_opd.config.training import MemoryConfig, OptimizerConfig, ParallelConfig, PrecisionConfig
from prune_opd.errors import ConfigError

READERS = ("box", "last_number", "box_or_last_number", "choice")
REGEX = "regex:"
# What stands behind a task's name in metrics.jsonl, beside its accuracy: eval_aime_low.
RESULT_SUFFIXES = ("_stderr", "_low", "_high", "_pass", "_readable", "_answers")


def extract_problem(field: str, extract: str) -> str | None:
    """Why answers cannot be read as `extract` says, in one line; None if they can (data/extract.py does it)."""
    if extract in READERS:
        return None
    if not extract.startswith(REGEX):
        return f"{field} = {extract!r} is not known: choose one of {', '.join(READERS)}, or {REGEX}PATTERN"
    try:
        pattern = re.compile(extract.removeprefix(REGEX))
    except re.error as error:
        return f"{field} = {extract!r} is no regular expression of Python ({error}): correct the pattern"
    if any(not found[0] for text in ("", "The answer is 48.\n") for found in pattern.finditer(text)):
        return f"{field} = {extract!r} matches empty text: let it ask for something, as in {REGEX}answer is (.+)"
    return None


@dataclass(frozen=True)
class EvalConfig(Checked, name="evaluation"):
    """Accuracy on held-out problems, sampled by the rollout engine. `every` = 0: only before and after the run."""

    every: CountOrZero = 0  # steps; 0: only before and after the run
    problems: CountOrZero = 256  # of each task; 0: no evaluation
    samples: Count = 1  # avg@samples
    temperature: PositiveOrZero = 1.0  # of the sampling; 0: greedy
    top_p: ShareAboveZero = 1.0  # the sampling's nucleus; the papers have 0.95
    max_len: Count | None = None  # None: horizon.max_len
    seed: int = 777  # of the problems and of the sampling, the same at every evaluation
    # where a response has its answer: box | last_number | box_or_last_number | choice | regex:PATTERN
    extract: str = "box"
    sources: tuple[str, ...] = ()  # tasks and files with answers, as data.source; none: the training source, held out
    generations: CountOrZero = 64  # answers of each task that every evaluation leaves in generations/

    def __post_init__(self) -> None:
        super().__post_init__()
        if problem := extract_problem("evaluation.extract", self.extract):
            raise ConfigError(problem)


@dataclass(frozen=True)
class CheckpointConfig(Checked, name="checkpoint"):
    """When checkpoints are written and which of them stay (megatron/checkpoint.py has the format)."""

    every: CountOrZero = 50  # steps; 0: only at the end
    keep: Count = 2  # newest checkpoints that stay on disk
    keep_every: CountOrZero = 0  # checkpoints of these steps stay for good: 100, 200 …; 0: none does
    asynchronous: bool = True  # a child process writes while the next steps run; False: the run waits for the disk
    # which can be loaded in other layouts: always: each, for which every rank gathers its replicas' optimizer state in
    # host memory | last: that of the last step; the others with the same model-parallel sizes, on any number of nodes
    any_layout: Literal["always", "last"] = "always"
    last: bool = True  # save after the last step; without it the run cannot be resumed or exported later
    export_hf: bool = True  # write hf/ at the end of the run


@dataclass(frozen=True)
class SurvivalConfig(Checked, name="survival"):
    """How much trouble a run takes before it ends (ranks/signals.py)."""

    max_skipped: Count = 3  # updates in a row whose loss or gradient is not finite: so many end the run
    watchdog_minutes: PositiveOrZero = (
        30.0  # a phase that takes longer ends the run, with the stacks of all ranks; 0: never
    )
    # nats; a step whose rollouts differ more than this from the trainer (mean of an engine's sampled tokens) ends the
    # run; null: by the format of the rollouts (MISMATCH_LIMIT); 0: never
    max_mismatch: PositiveOrZero | None = None
    # prompts whose reference text the teacher scores before the first step: a wrong checkpoint is refused; 0: none
    teacher_test: CountOrZero = 4


@dataclass(frozen=True)
class TrainConfig(Checked, name=""):
    """One Prune-OPD run. `student` and `teacher` are Hugging Face directories with the same tokenizer.

    There may be several teachers (`teachers`), each for a part of the data.

    The student may be its own teacher, as it begins or as a moving average; with a hint (`data.teacher_prompt`) that
    teaches it something.
    """

    name: str  # of the run: runs/NAME is its directory
    student: str  # a Hugging Face directory
    teacher: (
        str  # a Hugging Face directory | student: the student as it begins | ema: its moving average; empty: `teachers`
    )
    steps: Count  # of training; the schedule of the learning rate ends there
    horizon: HorizonConfig
    teacher_ema: TeacherEmaConfig = field(default_factory=TeacherEmaConfig)
    gate: GateConfig | None = field(default_factory=GateConfig)  # None: plain OPD, every token at weight 1
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    weighting: WeightingConfig = field(default_factory=WeightingConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    teacher_cache: TeacherCacheConfig = field(default_factory=TeacherCacheConfig)
    teacher_server: TeacherServerConfig = field(default_factory=TeacherServerConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    evaluation: EvalConfig = field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    survival: SurvivalConfig = field(default_factory=SurvivalConfig)
    track: TrackConfig = field(default_factory=TrackConfig)
    planning: PlanningConfig = field(default_factory=PlanningConfig)
    seed: int = 0  # of prompts, prompt order and sampling
    # save and stop after this step (a time-boxed job); the schedule stays that of `steps`
    stop_after: Count | None = None
    # several instead of `teacher`, by name: each teaches the prompts of its sources
    teachers: dict[str, TeacherConfig] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.gate is None and self.horizon.strategy in ("prune", "marginal", "adwin"):
            raise ConfigError(
                f"gate = null with horizon.strategy = {self.horizon.strategy}: the window follows the gate's reliable "
                "length; set a gate or another strategy"
            )
        extract = self.evaluation.extract
        if extract != "box" and set(self.evaluation.sources or self.data.sources) == {"ledger"}:
            raise ConfigError(
                f"evaluation.extract = {extract!r}: the ledger's answers have one form; set evaluation.extract=box"
            )
        check_teachers(self)
        check_inflight(self)
        check_long_tail(self)
        check_reuse(self)
        check_mismatch(self)
        check_reward(self)
        check_own_teacher(self.teacher, self.teacher_ema, self.precision)
        check_moving_teacher(self.teacher, self.teacher_cache, self.teacher_server)
        check_teacher_cache(self.teacher_cache, self.rollout)
        method = self.gate, self.objective, self.weighting
        check_teacher_server(self.teacher_server, *method, self.rollout, self.horizon, self.teacher_cache)

    @property
    def model_dirs(self) -> dict[str, str]:
        """The directory that each model is read from, by its role."""
        own = self.teacher in (STUDENT, EMA)
        return {"student": self.student, "teacher": self.student if own else self.teacher}

    @property
    def teacher_prompt_limit(self) -> int:
        """Most tokens of a prompt that the teacher reads."""
        return self.data.max_teacher_prompt_len or self.rollout.max_prompt_len

    def of_teacher(self, name: str) -> TrainConfig:
        """The run as if this teacher were its only one; with the name "" itself, where it has but one."""
        found: TrainConfig = alone(self, name) if self.teachers else self
        return found

    @property
    def by_teacher(self) -> dict[str, TrainConfig]:
        """Name → `of_teacher`, in order; the name is "" where there is one teacher."""
        return {name: self.of_teacher(name) for name in self.teachers or ("",)}

    @property
    def teacher_paths(self) -> tuple[str, ...]:
        """The directories of all teachers."""
        return tuple(own.model_dirs["teacher"] for own in self.by_teacher.values())

    @property
    def mismatch_limit(self) -> float | None:
        """Mean difference of engine and trainer that ends the run [nats]; None: none does."""
        limit = self.survival.max_mismatch
        return (self.usual_mismatch if limit is None else limit) or None

    @property
    def usual_mismatch(self) -> float:
        """What no sound engine of these number formats has, the trainer's FP8 among them [nats]."""
        trainer = "fp8" if self.precision.student_fp8.on else self.precision.params
        return MISMATCH_LIMIT[self.rollout.coarsest_format(trainer)]


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
            "what a look is worth is only known for stops at R = 0; set price=0, or leave stop_events out"
        )
    if inflight.stop_events is None and gate.w_drop == 0:
        raise ConfigError(
            "rollout.inflight.mode = gate with gate.w_drop = 0: reliability never falls to 0; give w_drop a value, set "
            f"rollout.inflight.stop_events, {off}"
        )
    if not gate.memory:
        raise ConfigError(
            "rollout.inflight.mode = gate with gate.memory = false: reliability comes back, so nothing may be cut off; "
            f"set gate.memory=true, {off}"
        )
    if gate.along and config.objective.ends == "class":
        raise ConfigError(
            f"rollout.inflight.mode = gate with gate.metric = {gate.metric} and objective.ends = class: the engine "
            f"does not say what mass the student has on all ends; take overlap or teacher_top_p, {off}"
        )
    if gate.along and config.objective.temperature != 1:
        raise ConfigError(
            f"rollout.inflight.mode = gate with gate.metric = {gate.metric} and objective.temperature = "
            f"{config.objective.temperature:g}: the engine knows the student's probabilities at 1 only; set "
            f"objective.temperature=1, or {off}"
        )
    if gate.metric in ("acceptance", "shared_mass"):
        raise ConfigError(
            f"rollout.inflight.mode = gate with gate.metric = {gate.metric}: which of its events no rounding decides "
            f"is not known; take change_point, overlap or teacher_top_p, {off}"
        )
    if gate.metric in ("overlap", "kl_agreement") and gate.threshold == 0:
        raise ConfigError(
            "rollout.inflight.mode = gate with gate.threshold = 0: nothing is below it, so nothing is ever stopped; "
            f"raise it, {off}"
        )
    longest = config.horizon.max_len
    looks = inflight.looks(longest)
    if not looks:
        raise ConfigError(
            f"rollout.inflight.first_check = {inflight.first_check} (min_keep = {inflight.min_keep}) leaves no look "
            f"before horizon.max_len = {longest}: lower it, {off}"
        )
    needed = inflight.stop_events or (math.ceil(1 / gate.w_drop - 1e-9) if gate.w_drop else 1)
    if needed > looks[-1]:
        raise ConfigError(
            f"rollout.inflight.mode = gate needs {needed} events to stop a response (gate.w_drop or stop_events), and "
            f"the last look is at token {looks[-1]}: nothing is ever stopped; raise gate.w_drop, lower "
            f"rollout.inflight.stop_events, {off}"
        )
    fields = {
        "gate.weight_normalisation = mean": gate.weight_normalisation == "mean",
        f"weighting.name = {config.weighting.name}": config.weighting.name in ("iw_opd", "tip"),
        f"objective.discount = {config.objective.discount:g}": config.objective.discount > 0,
    }
    if field := next((field for field, needs_whole in fields.items() if needs_whole), None):
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
    _check_stale_ratio(config, "rollout.partial = true", "rollout.partial=false")


def check_reuse(config: TrainConfig) -> None:
    """ConfigError where reused rollouts (`rollout.refresh_every`) meet what decides by the step that generates."""
    rollout, strategy = config.rollout, config.horizon.strategy
    if not rollout.reuses:
        return
    field, off = f"rollout.refresh_every = {rollout.refresh_every}", "rollout.refresh_every=1"
    if rollout.oversample > 1:
        raise ConfigError(
            f"{field} with rollout.oversample = {rollout.oversample:g}: what a step leaves would mix with what is kept "
            f"for the next ones; set rollout.oversample=1, or {off}"
        )
    if rollout.inflight.on:
        raise ConfigError(
            f"{field} with rollout.inflight.mode = gate: what the teacher has seen in flight is of one step's "
            f"responses; set rollout.inflight.mode=off, or {off}"
        )
    if rollout.refresh_every == 0 and strategy not in ("full", "topd"):
        raise ConfigError(
            f"{field} with horizon.strategy = {strategy}: all rollouts are generated before the first step, so the "
            "window would never move; set horizon.strategy=full or topd, or give the steps between two refreshes"
        )
    if strategy == "popd":
        raise ConfigError(
            f"{field} with horizon.strategy = popd: its horizon grows with the steps that generate, so "
            f"{rollout.refresh_every} times as slowly as horizon.interval says; set another strategy, or {off}"
        )
    _check_stale_ratio(config, field, off)


def _check_stale_ratio(config: TrainConfig, field: str, off: str) -> None:
    for name, value in (
        ("objective.temperature", config.objective.temperature),
        ("rollout.temperature", config.rollout.temperature),
    ):
        if value != 1:
            raise ConfigError(
                f"{field} with {name} = {value:g}: stale tokens are corrected by the ratio of both "
                f"students' probabilities at temperature 1; set {name}=1, or {off}"
            )


def check_mismatch(config: TrainConfig) -> None:
    """ConfigError where the ratio of trainer and engine is not that of the policy which the tokens come from."""
    field = f"objective.mismatch = {config.objective.mismatch}"
    if config.objective.mismatch == "none":
        return
    if not config.rollout.logprobs:
        raise ConfigError(
            f"{field} with rollout.logprobs = false: the engine's log-probabilities are not known; set "
            "rollout.logprobs=true, or objective.mismatch=none"
        )
    for name, value in (
        ("objective.temperature", config.objective.temperature),
        ("rollout.temperature", config.rollout.temperature),
        ("rollout.top_p", config.rollout.top_p),
    ):
        if value != 1:
            raise ConfigError(
                f"{field} with {name} = {value:g}: the ratio is that of probabilities at temperature 1 over the whole "
                f"vocabulary, and the tokens come from others then; set {name}=1, or objective.mismatch=none"
            )


def check_reward(config: TrainConfig) -> None:
    """ConfigError where a reward could teach nothing, or its gradient would be that of another policy."""
    reward, rollout = config.reward, config.rollout
    if not reward.on:
        return
    field = f"reward.name = {reward.name}"
    if (rollout.partial or rollout.reuses) and not rollout.correct_stale:
        raise ConfigError(
            f"{field} with rollout.correct_stale = false: stale tokens are an older student's, and without the ratio "
            "the gradient would be another policy's; set rollout.correct_stale=true, or reward.name=none"
        )
    if reward.normalise == "group" and rollout.responses == 1:
        raise ConfigError(
            f"{field} with reward.normalise = group and rollout.responses = 1: a response is its group's mean, so "
            "every advantage is 0; raise rollout.responses (8 is usual), or set reward.normalise=batch"
        )
    for name, value in (
        ("objective.temperature", config.objective.temperature),
        ("rollout.temperature", rollout.temperature),
        ("rollout.top_p", rollout.top_p),
    ):
        if value != 1:
            raise ConfigError(
                f"{field} with {name} = {value:g}: a policy gradient is that of the policy which samples, at "
                f"temperature 1 over the whole vocabulary; set {name}=1, or reward.name=none"
            )


def to_dict(config: Any) -> dict[str, Any]:
    """The plain nested dictionary of a config, as it is written to config.yaml."""
    return dataclasses.asdict(config)
