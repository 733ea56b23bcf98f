"""The training loop: Prune-OPD as every rank runs it, all ranks in step (`run.py` builds the parts).

prompts ─ sampler ─▶ rollout (vLLM, at most `horizon` tokens) ─▶ teacher pass (hidden states only)
    ─▶ student forward + gated loss + backward + Adam ─▶ controller: the next horizon ─▶ metrics
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from prune_opd.config import TrainConfig
from prune_opd.errors import REQUEUE_EXIT_CODE
from prune_opd.eval.evaluate import evaluation_record
from prune_opd.loss.stats import BatchStats
from prune_opd.loss.training_loss import ThisStep, gated_loss
from prune_opd.ranks.signals import Interruption
from prune_opd.run import Run, prepare
from prune_opd.track.clock import PhaseClock

if TYPE_CHECKING:  # megatron-core is imported after `platform.prepare`
    from prune_opd.megatron.train_batch import TrainBatch
    from prune_opd.megatron.trainer import StepResult


def train(
    config: TrainConfig, run_dir: Path, resume: str, interruption: Interruption, allow_config_change: bool = False
) -> int:
    """Run (or resume) a distillation to its last step, to `stop_after`, or until it is interrupted.

    Returns the process's exit code: 0, or `REQUEUE_EXIT_CODE` after an interruption that left steps to do.
    """
    return train_to_end(prepare(config, run_dir, resume, allow_config_change), interruption)


def train_to_end(run: Run, interruption: Interruption) -> int:
    """`train` on a run that is built already; whoever built it may have put parts of their own into it."""
    config, interrupted = run.config, False
    last = min(config.steps, config.stop_after or config.steps)
    with run.tracker:
        if run.finished_steps == 0:
            evaluate(run)
        while run.finished_steps < last and not interrupted:
            step(run)
            done, interrupted = run.finished_steps, interruption.agreed()
            run.checkpoints.poll()
            # Evaluate first: a kill between the two then repeats steps, and no evaluation is lost.
            if done == config.steps or _due(done, config.evaluation.every):
                evaluate(run)
            if interrupted or (done == last and config.checkpoint.last) or _due(done, config.checkpoint.every):
                run.save_checkpoint(last=done == config.steps)
        run.phases.enter("checkpoint")
        run.checkpoints.finish()
        if run.finished_steps == config.steps and config.checkpoint.export_hf:
            run.export()
    run.close()
    return REQUEUE_EXIT_CODE if run.finished_steps < last else 0


def step(run: Run) -> None:
    """One step of the method: sync → rollout → teacher → train → controller → log."""
    clock, number = PhaseClock(run.machine, run.phases.enter), run.finished_steps + 1
    horizon = run.controller.horizon
    with clock("sync"):
        run.refresh()
    with clock("rollout"):
        rollouts = run.generate(horizon, number)  # the in-flight gate stops drifting responses
    batch = run.train_batch(rollouts, clock)
    result, stats = train_on(run, batch, clock)
    run.tracker.step(
        {
            "step": number,
            "horizon": horizon,
            **stats.record(),
            **run.calibration.record(),
            **run.teacher_record(stats, rollouts),
            **batch.record(),
            **run.teacher.record,
            **run.inflight_record(rollouts, stats.reliable_length_B),
            **run.rollout.long_tail.record(rollouts),
            "lengths_by_position": stats.lengths(rollouts.length_B),
            "tokens_full": run.tokens_at_full_horizon(len(rollouts.responses)),
            **result.record(),
            "weight_norm": run.trainer.weight_norm(),
            "updates_skipped": len(batch.minibatches) - result.updates,
            **run.timed(rollouts, horizon, clock.record()),
        }
    )
    run.tracker.samples(number, horizon, rollouts, stats)
    run.check_mismatch(stats)


def train_on(run: Run, batch: TrainBatch, clock: PhaseClock) -> tuple[StepResult, BatchStats]:
    """The step once its rollouts are there: teacher → train → controller. Its updates, and what the gate saw."""
    rollouts, several, group = batch.rollouts, len(batch.minibatches) > 1, run.layout.student.tp_group
    with clock("teacher"):
        kept = run.inflight.kept if run.inflight else None  # rows that the teacher saw to their end in flight
        teacher_hidden = run.teacher.hidden(rollouts, batch.deals, kept)
    with clock("train"):
        stats = run.new_stats(rollouts)
        this = ThisStep(several, run.calibration.usual, batch.advantage_B, run.taught(rollouts))
        loss = gated_loss(run.config, run.teacher, teacher_hidden, run.vocab_size, group, stats, this)
        if several:
            run.trainer.look(batch.microbatches, loss)  # at the policy that sampled the batch, before it moves
        result = run.trainer.step_through(batch.minibatches, loss)
        stats.reduce(run.layout.reports)
        run.move_teacher()
    run.check_updates(result, rollouts)
    if not result.skipped:
        run.move_window(stats, rollouts)
    run.finished_steps += 1
    return result, stats


def evaluate(run: Run) -> None:
    """Accuracy of the student as it is now, on held-out problems at the full horizon."""
    if not run.evaluators:
        return
    run.sync(run.finished_steps)
    run.phases.enter("evaluation")
    generations = run.run_dir / "generations" if run.layout.is_main else None
    keep = run.config.evaluation.generations
    record = evaluation_record(run.rollout.engine, run.evaluators, run.finished_steps, generations, keep)
    run.full_response_length = record["eval_response_length"]
    run.tracker.evaluation(record)


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
