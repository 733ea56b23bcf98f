"""The parts of a run, built in the order in which they depend on each other, and what the loop asks of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from torch import Tensor

from prune_opd import platform
from prune_opd.config import MemoryConfig, TrainConfig, to_dict
from prune_opd.config.memory_phases import MemoryPhases
from prune_opd.config.yaml import save_config
from prune_opd.data.prompts import file_sources, make_sampler
from prune_opd.data.sampler import Sampler
from prune_opd.errors import ConfigError, UserError
from prune_opd.eval.evaluate import Evaluator, Sampling, make_evaluator
from prune_opd.inflight.gate import InflightGate
from prune_opd.loss.stats import BatchStats
from prune_opd.method.horizon import HorizonController, make_controller
from prune_opd.ranks.signals import Watchdog
from prune_opd.rollout.balance import Deal, deal, packing_record, padded_size
from prune_opd.rollout.batch import Rollouts
from prune_opd.rollout.engine import RolloutEngine
from prune_opd.rollout.long_tail import LongTail, begun_rows
from prune_opd.rollout.precision import rollout_format
from prune_opd.track.samples import sampled_rows
from prune_opd.track.tracker import NullTracker, Tracker

if TYPE_CHECKING:
    from prune_opd.megatron.checkpoint import Checkpoints
    from prune_opd.megatron.layout import Layout
    from prune_opd.megatron.packing import PackedBatch
    from prune_opd.megatron.redistribute import TeacherHidden
    from prune_opd.megatron.teacher import Teacher
    from prune_opd.megatron.trainer import StepResult, Trainer
    from prune_opd.weights.stream import Resharder

PARITY_PROMPTS, PARITY_TOKENS = 4, 32
# Nats by which the log-probability of a token may differ: of any token in fp32; on average in bf16, where rounding
# alone puts single tokens of a sharp model off by half a nat, and wrong weights give several nats on average. FP8
# rollouts of the tiny pair are 0.16 off on average.
PARITY_LIMIT = {"fp32": 1e-3, "bf16": 0.1, "fp8": 0.5}


def same_limits(horizon: int, responses: int, step: int) -> list[int]:
    """Most tokens of each response of a step's batch: the horizon."""
    return [horizon] * responses


@dataclass
class Run:
    """One rank's view of a run. The loop changes `finished_steps`; everything else has its own state."""

    config: TrainConfig
    run_dir: Path
    machine: platform.Platform
    layout: Layout
    trainer: Trainer
    teacher: Teacher
    engine: RolloutEngine
    sampler: Sampler
    controller: HorizonController
    checkpoints: Checkpoints
    evaluators: list[Evaluator]  # one a task; none: no evaluation
    tracker: NullTracker
    long_tail: LongTail
    inflight: InflightGate | None = None
    finished_steps: int = 0
    skipped_in_a_row: int = 0  # updates
    full_response_length: float | None = None  # tokens; what a response costs at the full horizon (last evaluation)
    limits: Callable[[int, int, int], list[int]] = same_limits
    memory: MemoryPhases = field(default_factory=lambda: MemoryPhases(MemoryConfig()))
    watchdog: Watchdog | None = None
    _engine_has: int | None = field(default=None, repr=False)  # finished_steps of the weights that the engine holds
    _look_again: bool = field(default=False, repr=False)  # after the next sync

    @property
    def vocab_size(self) -> int:
        """Ids that both models know; rows beyond are padding."""
        return min(self.trainer.spec.vocab_size, self.teacher.spec.vocab_size)

    def enter(self, phase: str) -> None:
        """A phase of the run begins: the watchdog's time starts anew, and the device holds what the phase needs."""
        if self.watchdog:
            self.watchdog.enter(phase)
        self.memory.enter(phase)

    def close(self) -> None:
        """End the run on every rank at once: a rank that ends before the others have would have them ended."""
        if self.watchdog:
            self.watchdog.close()
        self.engine.close()

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

    def generate(self, horizon: int, step: int) -> Rollouts:
        """The step's rollouts, of the groups that wait from the step before and of new prompts.

        The in-flight gate, if there is one, stops drifting responses on the way.
        """
        rollout = self.config.rollout
        groups = self.long_tail.next(self.sampler)
        rows = len(groups) * rollout.responses
        begun = [group for group in groups if group.begun]  # they come first
        limits = self.limits(horizon, rows, step)
        if self.inflight is not None:
            self.enter("inflight")
        rollouts = self.engine.generate(
            [group.prompt for group in groups],
            rollout.responses,
            max_tokens=limits,
            seed=self.config.seed,
            step=step,
            temperature=rollout.temperature,
            top_p=rollout.top_p,
            logprobs=rollout.partial,
            watch=self.inflight,
            expected=self.long_tail.expected(groups, limits),
            begun=begun_rows(groups, rollout.responses) if begun else None,
            keep=rollout.prompts,
            wait_for=len(begun),
        )
        self.long_tail.take(rollouts)
        return rollouts

    def teacher_hidden(self, rollouts: Rollouts) -> TeacherHidden:
        """The teacher's hidden states of the batch; rows that it saw to their end in flight are not computed again."""
        return self.teacher.hidden(rollouts, self.deals(rollouts), self.inflight.kept if self.inflight else None)

    def inflight_record(self, rollouts: Rollouts, reliable_length_B: Tensor) -> dict[str, Any]:
        """The in-flight gate's part of a step record; it learns from the step for the next one."""
        if self.inflight is None:
            return {"pruned_inflight": 0}
        self.inflight.learn(rollouts, reliable_length_B)
        return self.inflight.record(rollouts, reliable_length_B)

    def sync_weights(self) -> None:
        """Reshard the student's weights into the engine, unless it has them already.

        The first time the log-probabilities are compared; every time the stream compares checksums of what it moves. A
        new run's engine has read the first weights itself, so it is looked at again after the second time when its
        model is compiled: a graph could have kept them.
        """
        self.enter("sync")
        if self._engine_has == self.finished_steps and self.engine.holds_weights:
            return
        first = self._engine_has is None
        self.engine.load(self._resharder.stream())
        self._engine_has = self.finished_steps
        if first or self._look_again:
            self._look_again = first and self.engine.compiled
            self.enter("parity")
            self._assert_logprob_parity()

    @cached_property
    def _resharder(self) -> Resharder:
        from prune_opd.weights.stream import Resharder

        return Resharder(self.trainer.chunks, self.config.rollout.bucket_mb)

    def _packed(self, rollouts: Rollouts, deal: Deal) -> list[PackedBatch]:
        from prune_opd.megatron.packing import pack_rows

        prompts, responses = rollouts.prompt_ids, rollouts.response_ids
        shape = (self.machine.device, self.trainer.chunks[0].token_multiple, self.layout.student.cp_group)
        stale = rollouts.stale_logprobs_B if any(rollouts.stale_logprobs_B) else None
        return [pack_rows(prompts, responses, rows, *shape, stale) for rows in deal[self.layout.dp_rank]]

    def minibatches(self, rollouts: Rollouts) -> list[list[PackedBatch]]:
        """This data-parallel rank's part of each update's share of the batch, as packed micro-batches."""
        return [self._packed(rollouts, deal) for deal in self.deals(rollouts)]

    def deals(self, rollouts: Rollouts) -> list[Deal]:
        """Which rows each data-parallel rank trains on, in which micro-batch: one deal of each update."""
        return [self._deal(rollouts, first, last) for first, last in self._shares(rollouts)]

    def packing_record(self, rollouts: Rollouts) -> dict[str, float]:
        """The packing's part of a step record: of the global batch, the same on every rank."""
        student = self.layout.student
        multiple = student.batch_multiple(self.trainer.chunks[0].token_multiple)
        return packing_record(rollouts.row_length_B, self.deals(rollouts), multiple, student.row_multiple)

    def _shares(self, rollouts: Rollouts) -> list[tuple[int, int]]:
        """First row and one past the last of each update: `updates_per_batch` runs of whole responses, in their order.

        The shares are those of the global batch, so that the updates are the same at every data-parallel size.
        """
        count, updates = len(rollouts.responses), self.config.optimizer.updates_per_batch
        return list(pairwise(count * i // updates for i in range(updates + 1)))

    def _deal(self, rollouts: Rollouts, first: int, last: int) -> Deal:
        """Rows first … last − 1 for every data-parallel rank."""
        rows = range(len(rollouts.responses))[first:last]
        student, budget = self.layout.student, self.config.parallel.microbatch_tokens
        lengths = [padded_size(length, student.row_multiple) for length in rollouts.row_length_B]
        return deal(lengths, rows, student.dp, budget * student.cp, student.microbatch_multiple)

    def new_stats(self, responses: int, stopped: Sequence[int] = ()) -> BatchStats:
        """The next step's; it watches the rows that samples.jsonl gets. stopped: the rows that were cut in flight."""
        track, step, longest = self.config.track, self.finished_steps + 1, self.config.horizon.max_len
        watched = sampled_rows(track, step, self.config.steps, responses, stopped)
        return BatchStats(responses, track.position_bins, longest, self.machine.device, watched)

    def tokens_at_full_horizon(self, responses: int) -> float | None:
        return None if self.full_response_length is None else responses * self.full_response_length

    def save_checkpoint(self) -> None:
        self.enter("checkpoint")
        rng: list[Any] = [None] * self.layout.world
        dist.all_gather_object(rng, platform.rng_state())
        state = {
            "config": to_dict(self.config),
            "schedule": self.trainer.schedule.state_dict(),
            "controller": self.controller.state_dict(),
            "sampler": self.sampler.state_dict(),
            "long_tail": self.long_tail.state_dict(),
            "inflight": self.inflight.plan.state_dict() if self.inflight else None,
            "full_response_length": self.full_response_length,
            "rng": rng,
        }
        self.checkpoints.save(self.finished_steps, self.trainer, state)

    def load_checkpoint(self, checkpoint: Path, allow_config_change: bool = False) -> list[str]:
        """Continue where a checkpoint stands. Returns what starts anew, because its settings were allowed to change."""
        state = self.checkpoints.load(checkpoint, self.trainer)
        self.trainer.schedule.load_state_dict(state["schedule"])
        anew: dict[str, str] = {}
        for name in ("controller", "sampler"):
            try:
                getattr(self, name).load_state_dict(state[name])
            except ConfigError as error:
                if not allow_config_change:
                    raise
                anew[name] = f"the {name} starts anew: {error}"
        if "long_tail" in state and "sampler" not in anew:  # an older version's checkpoint has none
            self.long_tail.load_state_dict(state["long_tail"])
        if self.inflight and state.get("inflight"):
            self.inflight.plan.load_state_dict(state["inflight"])
        self.full_response_length = state["full_response_length"]
        if len(state["rng"]) == self.layout.world:  # another world size has no generator of ours to continue
            platform.load_rng_state(state["rng"][self.layout.rank])
        self.finished_steps = state["step"]
        return list(anew.values())

    def export(self) -> None:
        """Leave the student as a Hugging Face directory in `hf/`."""
        from prune_opd.weights.stream import export_hf

        self.enter("export")
        out = self.run_dir / "hf"
        export_hf(self.trainer.chunks, self.config.student, out, write=self.layout.is_main)
        self.tracker.note(f"student: {out}")

    def _assert_logprob_parity(self) -> None:
        """The engine and the trainer must give the same tokens the same log-probability, or the rollouts are not ours.

        Raises `UserError` naming the difference and the limit.
        """
        from prune_opd.megatron.logprobs import sampled_logprobs

        # At least one for each engine: a reload can fail on one of them alone.
        source, count = self.sampler.source, max(PARITY_PROMPTS, self.engine.engines)
        prompts = [source.get(i % (source.size or count)) for i in range(count)]
        rollouts = self.engine.generate(
            prompts, 1, PARITY_TOKENS, self.config.seed, 0, self.config.objective.temperature, logprobs=True
        )
        ours = sampled_logprobs(self.trainer.chunks, rollouts, self.layout, self.machine.device)
        theirs = [logprob for response in rollouts.responses for logprob in response.logprobs or ()]
        differences = [abs(a - b) for a, b in zip(ours, theirs, strict=True)]
        precision = rollout_format(self.config.precision.params, self.config.rollout)
        found = max(differences) if precision == "fp32" else sum(differences) / len(differences)
        if not found <= PARITY_LIMIT[precision]:
            raise UserError(
                f"after a weight sync the rollout engine and the trainer differ by {found:.2e} nats in the "
                f"log-probability of a token (limit in {precision}: {PARITY_LIMIT[precision]:g}): "
                "the weights in the engine are not the student's"
            )


def prepare(config: TrainConfig, run_dir: Path, resume: str, allow_config_change: bool = False) -> Run:
    """Build every part, restore a checkpoint if there is one to resume, and open the run directory's files."""
    machine = platform.prepare()
    from transformers import AutoTokenizer

    from prune_opd.megatron import layout as layouts
    from prune_opd.megatron.checkpoint import Checkpoints
    from prune_opd.megatron.model import dtype_of
    from prune_opd.megatron.offload import handlers
    from prune_opd.megatron.teacher import Teacher
    from prune_opd.megatron.trainer import Trainer

    # A collective that gives up sooner than the watchdog would end the run without anybody's stacks.
    patience = max(config.parallel.timeout_minutes, 1.2 * config.survival.watchdog_minutes)
    layout = layouts.initialize(replace(config.parallel, timeout_minutes=patience), machine, config.seed)
    watchdog = Watchdog(config.survival.watchdog_minutes, run_dir / "stacks", layout.rank)
    dtype = dtype_of(config.precision.params)
    tokenizer = AutoTokenizer.from_pretrained(config.student)
    sampler = make_sampler(config.data, tokenizer, config.seed, config.rollout.max_prompt_len)
    parallel, precision, memory = config.parallel, config.precision, config.memory
    student_fp8, teacher_fp8 = precision.student_fp8, precision.teacher_fp8
    trainer = Trainer(
        config.student, config.optimizer, parallel, config.steps, layout, dtype, machine.device, student_fp8
    )
    teacher = Teacher(config.teacher, layout, dtype, machine.device, parallel.microbatch_tokens, teacher_fp8)
    longest = max(config.horizon.max_len, config.evaluation.max_len or 0)
    vocab_size = min(trainer.spec.vocab_size, teacher.spec.vocab_size)
    inflight = InflightGate(config, teacher, layout, vocab_size) if config.rollout.inflight.on else None
    engine = RolloutEngine(
        config.student,
        config.rollout,
        longest,
        dtype,
        machine,
        sleep_level=memory.sleep_level,
        max_logprobs=inflight.top or 0 if inflight else 0,
        timeout_minutes=parallel.timeout_minutes,
    )
    run = Run(
        config=config,
        run_dir=run_dir,
        machine=machine,
        layout=layout,
        trainer=trainer,
        teacher=teacher,
        engine=engine,
        sampler=sampler,
        controller=make_controller(config.horizon),
        checkpoints=Checkpoints(run_dir / "checkpoints", config.checkpoint, layout),
        evaluators=_evaluators(config, tokenizer),
        tracker=NullTracker(),
        long_tail=LongTail(config.rollout, sampler.endless),
        inflight=inflight,
        memory=MemoryPhases(
            memory,
            None if machine.is_cpu else handlers(trainer, teacher, engine, machine),
            run_dir / "memory.json" if layout.is_main else None,
        ),
        watchdog=watchdog,
    )
    checkpoint, notes = _checkpoint_to_resume(resume, run.checkpoints)
    if checkpoint:
        notes += [f"resumed from {checkpoint}", *run.load_checkpoint(checkpoint, allow_config_change)]
    notes += [f"{source.path}: {source.skipped_summary()}" for source in file_sources(sampler) if source.skipped]
    if layout.is_main:
        run_dir.mkdir(parents=True, exist_ok=True)
        save_config(config, run_dir / "config.yaml")
        run.tracker = Tracker(run_dir, config, to_dict(config), run.finished_steps, tokenizer)
        if memory.on and machine.is_cpu:
            run.tracker.note("memory: a dry run on the CPU; memory.json has what a GPU would do, and nothing moves")
        for note in notes:
            run.tracker.note(note)
    return run


def _checkpoint_to_resume(resume: str, checkpoints: Checkpoints) -> tuple[Path | None, list[str]]:
    """The checkpoint to go on from, and what is to be said about the choice."""
    if resume == "never":
        return None, []
    if resume == "auto":
        return checkpoints.newest_good()
    if problem := checkpoints.problem_with(Path(resume)):
        raise UserError(f"--resume {resume}: {problem}; take --resume auto, or an earlier checkpoint")
    return Path(resume), []


def _evaluators(config: TrainConfig, tokenizer: Any) -> list[Evaluator]:
    settings = config.evaluation
    if settings.problems == 0:
        return []
    length = settings.max_len or config.horizon.max_len
    sampling = Sampling(settings.samples, length, settings.temperature, settings.top_p, settings.seed)
    longest = config.rollout.max_prompt_len
    return [
        make_evaluator(tokenizer, replace(config.data, source=source), settings.problems, longest, sampling)
        for source in settings.sources or config.data.sources
    ]
