"""The parts of a run, built in the order in which they depend on each other, and what the loop asks of them."""

from __future__ import annotations

import os
import socket
import sys
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from torch import Tensor

from prune_opd import platform
from prune_opd.config import MemoryConfig, TrainConfig, to_dict
from prune_opd.config.memory_phases import MemoryPhases
from prune_opd.config.teacher import EMA
from prune_opd.config.yaml import save_config
from prune_opd.data.ends import end_class, terminal_ids, write_ends
from prune_opd.data.prompts import file_sources, make_sampler
from prune_opd.data.routing import make_route
from prune_opd.data.sampler import Sampler
from prune_opd.errors import ConfigError, UserError
from prune_opd.eval.evaluate import Evaluator, make_evaluators
from prune_opd.inflight.by_teacher import InflightGates, calibrate, make_inflight
from prune_opd.inflight.gate import InflightGate
from prune_opd.loss.mismatch import Mismatch
from prune_opd.loss.stats import BatchStats
from prune_opd.loss.training_loss import Taught
from prune_opd.method.by_teacher import CalibrationByTeacher, HorizonByTeacher, move_each
from prune_opd.method.calibration import Calibration
from prune_opd.method.horizon import HorizonController, make_controller
from prune_opd.model_spec import ModelSpec
from prune_opd.plan.speed import SpeedMeter
from prune_opd.process import tell
from prune_opd.ranks.agreement import must_agree
from prune_opd.ranks.lease import end_if_lost
from prune_opd.ranks.signals import Watchdog
from prune_opd.rollout.batch import Rollouts
from prune_opd.rollout.engine import EngineOptions, RolloutEngine
from prune_opd.rollout.long_tail import LongTail
from prune_opd.rollout.phase import RolloutPhase
from prune_opd.rollout.reward import RewardModel, make_reward
from prune_opd.track.by_teacher import record_by_teacher
from prune_opd.track.clock import Clock
from prune_opd.track.samples import sampled_rows
from prune_opd.track.startup import IMPORTING, StartUp
from prune_opd.track.tracker import NullTracker, Tracker

if TYPE_CHECKING:  # megatron-core is imported after `platform.prepare`
    from prune_opd.megatron.checkpoint import Checkpoints
    from prune_opd.megatron.layout import Layout
    from prune_opd.megatron.served_teacher import ServedTeacher
    from prune_opd.megatron.sync import WeightSync
    from prune_opd.megatron.teacher import Teacher
    from prune_opd.megatron.teachers import Teachers
    from prune_opd.megatron.train_batch import TrainBatch
    from prune_opd.megatron.trainer import StepResult, Trainer


@dataclass
class Phases:
    """The phase that this rank is in: the watchdog's time starts anew with it, and the device holds what it needs."""

    memory: MemoryPhases = field(default_factory=lambda: MemoryPhases(MemoryConfig()))
    watchdog: Watchdog | None = None
    tracker: NullTracker = field(default_factory=NullTracker)

    def enter(self, phase: str) -> None:
        end_if_lost()
        self.tracker.phase(phase)
        if self.watchdog:
            self.watchdog.enter(phase)
        self.memory.enter(phase)


@dataclass
class Run:
    """One rank's view of a run. The loop changes `finished_steps`; everything else has its own state."""

    config: TrainConfig
    run_dir: Path
    machine: platform.Platform
    layout: Layout
    trainer: Trainer
    teacher: Teacher | ServedTeacher | Teachers
    rollout: RolloutPhase
    sync: WeightSync
    controller: HorizonController
    calibration: Calibration | CalibrationByTeacher
    checkpoints: Checkpoints
    evaluators: list[Evaluator] = field(default_factory=list)  # one a task; none: no evaluation
    inflight: InflightGate | InflightGates | None = None
    reward: RewardModel | None = None
    phases: Phases = field(default_factory=Phases)
    tracker: NullTracker = field(default_factory=NullTracker)
    meter: SpeedMeter | None = None
    horizons: dict[str, int] = field(default_factory=dict)  # each teacher's own in this step, of several
    finished_steps: int = 0
    skipped_in_a_row: int = 0  # updates
    full_response_length: float | None = None  # tokens; what a response costs at the full horizon (last evaluation)

    @property
    def vocab_size(self) -> int:
        """Ids that all models know; rows beyond are padding."""
        return min(self.trainer.spec.vocab_size, self.teacher.spec.vocab_size)

    def close(self) -> None:
        """End the run on every rank at once: a rank that ends before the others have would have them ended."""
        if self.phases.watchdog:
            self.phases.watchdog.close()
        self.rollout.engine.close()

    def refresh(self) -> None:
        """Bring the student into the engine, unless this step's rollouts are there already (`refresh_every`)."""
        if not self.rollout.long_tail.stocked:
            self.sync(self.finished_steps)

    def move_window(self, stats: BatchStats, rollouts: Rollouts) -> None:
        """Let the controller and the calibration see a step, those of each teacher their own part of it."""
        rows = stats.reliable_length_B, rollouts.length_B, rollouts.finished_B
        move_each(self.controller, self.calibration, stats, rollouts.teacher_B, rows, self.rollout.long_tail.age > 0)

    def generate(self, horizon: int, step: int) -> Rollouts:
        """The step's rollouts. The in-flight gate, if there is one, stops drifting responses on the way."""
        inflight, controller, calibration = self.inflight, self.controller, self.calibration
        if inflight is not None:
            self.phases.enter("inflight")
            calibrate(inflight, calibration)
        limit_of = controller.of_prompt if isinstance(controller, HorizonByTeacher) else None
        self.horizons = controller.record() if isinstance(controller, HorizonByTeacher) else {}
        return self.rollout.generate(horizon, step, inflight, limit_of)

    def taught(self, rollouts: Rollouts) -> Taught | None:
        """With several teachers: who teaches which row, and what is usual for each."""
        known = self.calibration
        return Taught(rollouts.teacher_B, known.usual_of) if isinstance(known, CalibrationByTeacher) else None

    def train_batch(self, rollouts: Rollouts, clock: Clock = nullcontext) -> TrainBatch:
        """The step's rollouts as the ranks train on them, with a task's rewards if there are any (a phase)."""
        from prune_opd.megatron.train_batch import make_batch

        updates, budget = self.config.optimizer.updates_per_batch, self.config.parallel.microbatch_tokens
        multiple = self.trainer.chunks[0].token_multiple
        batch = make_batch(rollouts, updates, self.layout.student, budget, multiple, self.machine.device)
        if self.reward is None:
            return batch
        with clock("reward"):
            return replace(batch, rewards=self.reward(rollouts))

    def new_stats(self, rollouts: Rollouts) -> BatchStats:
        """The next step's; it watches the rows that samples.jsonl gets."""
        config, responses = self.config, len(rollouts.responses)
        step = self.finished_steps + 1
        watched = sampled_rows(config.track, step, config.steps, rollouts.prompts, rollouts.stopped_rows)
        gate, device = config.gate, self.machine.device
        early = (gate.early_tokens, gate.k) if gate else (0, config.objective.k)
        bins, logprobs_B, mismatch = config.track.position_bins, rollouts.fresh_logprobs_B, None
        if logprobs_B is not None and config.objective.temperature == 1:  # the engine's are those at temperature 1
            mismatch = Mismatch(logprobs_B, rollouts.engine_B, config.objective.mismatch_bounds, device)
        of_batch = (responses, bins, config.horizon.max_len, device)
        # What a teacher in a server thinks of all ends is not known.
        ends = () if config.teacher_server.on else terminal_ids(config, self.vocab_size)
        stats = BatchStats(*of_batch, watched, early, mismatch, ends)
        stats.parts = {name: BatchStats(*of_batch, early=early, terminal_ids=ends) for name in config.teachers}
        return stats

    def teacher_record(self, stats: BatchStats, rollouts: Rollouts) -> dict[str, Any]:
        """What the step record says of each of several teachers."""
        return {**self.horizons, **record_by_teacher(stats, rollouts)}

    def move_teacher(self) -> None:
        """Let a teacher that is the student's moving average follow it."""
        if self.trainer.average:
            self.phases.enter("average")
            self.trainer.average.update()

    def check_updates(self, result: StepResult, rollouts: Rollouts) -> None:
        """Say which updates of this step were skipped, and where. Raises `UserError` after too many in a row."""
        for failures in result.skipped:
            self.skipped_in_a_row += 1
            where = "; ".join(failure.describe(rollouts) for failure in failures)
            text = f"step {self.finished_steps + 1}: an update was skipped, {where}"
            if self.skipped_in_a_row >= self.config.survival.max_skipped:
                raise UserError(
                    f"{text}. That is {self.skipped_in_a_row} in a row, survival.max_skipped allows no more: look at "
                    "those prompts, lower optimizer.lr, or resume from an earlier checkpoint"
                )
            self.tracker.note(text)
        if result.updates:
            self.skipped_in_a_row = 0

    def check_mismatch(self, stats: BatchStats) -> None:
        """Raise `UserError` on all ranks if an engine's rollouts were too far from the trainer (`max_mismatch`)."""
        limit, worst = self.config.mismatch_limit, stats.mismatch.worst() if stats.mismatch else None
        if limit is None or worst is None or worst[1] <= limit:
            return
        raise UserError(
            f"step {self.finished_steps}: rollout engine {worst[0]} and the trainer differ by {worst[1]:.2e} nats on "
            f"average in the log-probability of a sampled token (limit: {limit:g}): the weights in that engine are not "
            "the student's; start again from the last checkpoint, or raise survival.max_mismatch for a coarser format"
        )

    def inflight_record(self, rollouts: Rollouts, reliable_length_B: Tensor) -> dict[str, Any]:
        """The in-flight gate's part of a step record; it learns from the step for the next one."""
        if self.inflight is None:
            return {"pruned_inflight": 0}
        self.inflight.learn(rollouts, reliable_length_B)
        return self.inflight.record(rollouts, reliable_length_B)

    def timed(self, rollouts: Rollouts, horizon: int, times: dict[str, float]) -> dict[str, float]:
        """The clock's part of a step record, and what it says of the speed."""
        return times if self.meter is None else times | self.meter.record(rollouts, horizon, times, self.teacher.known)

    def tokens_at_full_horizon(self, responses: int) -> float | None:
        return None if self.full_response_length is None else responses * self.full_response_length

    def save_checkpoint(self, last: bool = False) -> None:
        """Begin to save. last: after the run's last step."""
        self.phases.enter("checkpoint")
        from prune_opd.megatron.counted import frozen_sum

        rng: list[Any] = [None] * self.layout.world
        dist.all_gather_object(rng, platform.rng_state())
        state = {
            "config": to_dict(self.config),
            "schedule": self.trainer.schedule.state_dict(),
            "controller": self.controller.state_dict(),
            "calibration": self.calibration.state_dict(),
            "sampler": self.rollout.sampler.state_dict(),
            "long_tail": self.rollout.long_tail.state_dict(),
            "inflight": self.inflight.schedule.state_dict() if self.inflight else None,
            "full_response_length": self.full_response_length,
            "frozen": frozen_sum(self.trainer.chunks) if self.config.lora.on else None,
            "rng": rng,
        }
        whole = not self.config.parallel.distributed_optimizer  # each replica has all of the optimizer's state
        any_layout = last or whole or self.config.checkpoint.any_layout == "always"
        self.checkpoints.save(self.finished_steps, self.trainer, state, any_layout)

    def load_checkpoint(self, checkpoint: Path, allow_config_change: bool = False) -> list[str]:
        """Continue where a checkpoint stands. Returns what starts anew, because its settings were allowed to change."""
        from prune_opd.megatron.counted import check_frozen

        state = self.checkpoints.load(checkpoint, self.trainer)
        check_frozen(self.trainer.chunks, state.get("frozen"), checkpoint, self.config.student)
        if self.trainer.average:
            self.phases.memory.enter("average")
            self.trainer.average.show()
        self.trainer.schedule.load_state_dict(state["schedule"])
        anew: dict[str, str] = {}
        parts: dict[str, HorizonController | Sampler | Calibration | CalibrationByTeacher | LongTail] = {
            "controller": self.controller,
            "sampler": self.rollout.sampler,
            "calibration": self.calibration,
            "long_tail": self.rollout.long_tail,  # of the sampler's prompts
        }
        for name, part in parts.items():
            try:
                if name in state and not (name == "long_tail" and "sampler" in anew):  # an older version's has fewer
                    part.load_state_dict(state[name])
            except ConfigError as error:
                if not allow_config_change:
                    raise
                anew[name] = f"the {name} starts anew: {error}"
        if self.inflight and state.get("inflight"):
            self.inflight.schedule.load_state_dict(state["inflight"])
        self.full_response_length = state["full_response_length"]
        if len(state["rng"]) == self.layout.world:  # another world size has no generator of ours to continue
            platform.load_rng_state(state["rng"][self.layout.rank])
        self.finished_steps = state["step"]
        return list(anew.values())

    def export(self) -> None:
        """Leave the student as a Hugging Face directory in `hf/`."""
        from prune_opd.weights.stream import export_hf

        self.phases.enter("export")
        out = self.run_dir / "hf"
        export_hf(self.trainer.chunks, self.config.student, out, write=self.layout.is_main)
        if self.layout.is_main and (ends := end_class(self.config, self.vocab_size)):
            write_ends(out, ends)  # whoever loads it stops where the run did
        self.tracker.note(f"student: {out}")


def prepare(config: TrainConfig, run_dir: Path, resume: str, allow_config_change: bool = False) -> Run:
    """Build every part, restore a checkpoint if there is one to resume, and open the run directory's files."""
    with StartUp(speaks=os.environ.get("RANK", "0") == "0") as startup:
        tell("starting ranks" if "vllm" in sys.modules else IMPORTING)
        return _prepare(config, run_dir, resume, allow_config_change, startup)


def _prepare(config: TrainConfig, run_dir: Path, resume: str, allow_config_change: bool, startup: StartUp) -> Run:
    machine = platform.prepare()
    from prune_opd.data.tokenizer import load_tokenizer
    from prune_opd.megatron import layout as layouts
    from prune_opd.megatron.average import MovingAverage
    from prune_opd.megatron.checkpoint import Checkpoints
    from prune_opd.megatron.model import dtype_of
    from prune_opd.megatron.offload import handlers
    from prune_opd.megatron.self_test import check_teacher
    from prune_opd.megatron.sync import WeightSync
    from prune_opd.megatron.teacher import Teacher
    from prune_opd.megatron.teachers import Teachers, build_teachers
    from prune_opd.megatron.trainer import Trainer, Tuning

    # A collective that gives up sooner than the watchdog would end the run without anybody's stacks.
    patience = max(config.parallel.timeout_minutes, 1.2 * config.survival.watchdog_minutes)
    layout = layouts.initialize(replace(config.parallel, timeout_minutes=patience), machine, config.seed)
    phases = Phases(watchdog=Watchdog(config.survival.watchdog_minutes, run_dir / "stacks", layout.rank))
    dtype = dtype_of(config.precision.params)
    tokenizer = load_tokenizer(config.student)
    extract = config.evaluation.extract
    sampler = make_sampler(
        config.data, tokenizer, config.seed, config.rollout.max_prompt_len, extract=extract, route=make_route(config)
    )
    reward = make_reward(config, tokenizer, sampler)
    parallel, memory = config.parallel, config.memory
    tuning = Tuning(config.precision.student_fp8, config.lora, config.seed)
    tell(f"student: {config.student}")
    trainer = Trainer(config.student, config.optimizer, parallel, config.steps, layout, dtype, machine.device, tuning)
    specs = [ModelSpec.read(path) for path in config.teacher_paths]
    vocab_size = min(trainer.spec.vocab_size, *(spec.vocab_size for spec in specs))
    read = terminal_ids(config, vocab_size)
    must_agree("the ids that end a response", read, "copy the same files of student and teacher to every node")
    built = build_teachers(
        config,
        layout,
        dtype,
        machine,
        run_dir,
        lambda name, own, one: check_teacher(own, one, sampler, vocab_size, name),
    )
    teacher = built.teacher
    if config.teacher == EMA and isinstance(teacher, Teacher):
        trainer.average = MovingAverage(teacher, trainer.chunks, config.teacher_ema.decay, config.rollout.bucket_mb)
    longest = max(config.horizon.max_len, config.evaluation.max_len or 0)
    inflight = make_inflight(config, teacher, layout, vocab_size)
    top, ends = inflight.top or 0 if inflight else 0, end_class(config, vocab_size)
    options = EngineOptions(memory.sleep_level, top, parallel.timeout_minutes, ends, tokenizer.eos_token_id)
    tell("starting vLLM")
    engines: list[RolloutEngine] = []
    phases.memory = MemoryPhases(
        memory,
        None if machine.is_cpu else handlers(trainer, teacher, lambda: engines[0], machine) | built.movers,
        run_dir / "memory.json" if layout.is_main else None,
        tuple(config.teachers),
        built.away,
    )
    if isinstance(teacher, Teachers):
        teacher.turn = phases.memory.take_turn
    with phases.memory.building_engine():
        engine = RolloutEngine(config.student, config.rollout, longest, dtype, machine, options)
        engines.append(engine)
    rollout = RolloutPhase(config, engine, sampler)
    run = Run(
        config=config,
        run_dir=run_dir,
        machine=machine,
        layout=layout,
        trainer=trainer,
        teacher=teacher,
        rollout=rollout,
        sync=WeightSync(config, trainer, rollout, phases.enter),
        controller=HorizonByTeacher(config) if config.teachers else make_controller(config.horizon),
        calibration=CalibrationByTeacher(config) if config.teachers else Calibration(config.gate),
        checkpoints=Checkpoints(run_dir / "checkpoints", config.checkpoint, layout),
        evaluators=make_evaluators(config, tokenizer),
        inflight=inflight,
        reward=reward,
        phases=phases,
        meter=SpeedMeter(config, trainer.spec, dict(zip(config.by_teacher, specs, strict=True)), layout.world),
    )
    checkpoint, notes = run.checkpoints.to_resume(resume)
    if checkpoint:
        tell(f"loading {checkpoint}")
        phases.memory.enter("checkpoint")
        notes += [f"resumed from {checkpoint}", *run.load_checkpoint(checkpoint, allow_config_change)]
    notes += built.notes
    notes += [note for source in file_sources(sampler) for note in source.notes()]
    hosts: list[Any] = [None] * layout.world
    dist.all_gather_object(hosts, socket.gethostname())
    if layout.is_main:
        run_dir.mkdir(parents=True, exist_ok=True)
        save_config(config, run_dir / "config.yaml")
        tell("ready")
        run.tracker = Tracker(
            run_dir, config, to_dict(config), run.finished_steps, tokenizer, (hosts, machine.gpu_names())
        )
        run.tracker.started(startup.lines)
        phases.tracker = run.tracker
        teacher.note = run.tracker.note
        if memory.on and machine.is_cpu:
            run.tracker.note("memory: a dry run on the CPU; memory.json has what a GPU would do, and nothing moves")
        for note in notes:
            run.tracker.note(note)
    return run
