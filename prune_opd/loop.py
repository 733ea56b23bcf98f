"""The training loop: Prune-OPD as every rank runs it, all ranks in step (`run.py` builds the parts).

prompts ─ sampler ─▶ rollout (vLLM, at most `horizon` tokens) ─▶ teacher pass (hidden states only)
    ─▶ student forward + gated loss + backward + Adam ─▶ controller: the next horizon ─▶ metrics
"""

from __future__ import annotations

from pathlib import Path

from prune_opd.config import TrainConfig
from prune_opd.errors import REQUEUE_EXIT_CODE
from prune_opd.eval.evaluate import evaluation_record
from prune_opd.loss.training_loss import gated_loss
from prune_opd.ranks.signals import Interruption
from prune_opd.run import Run, prepare
from prune_opd.track.clock import PhaseClock


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
                run.save_checkpoint()
        run.enter("checkpoint")
        run.checkpoints.finish()
        if run.finished_steps == config.steps and config.checkpoint.export_hf:
            run.export()
    run.close()
    return REQUEUE_EXIT_CODE if run.finished_steps < last else 0


def step(run: Run) -> None:
    """One step of the method: sync → rollout → teacher → train → controller → log."""
    clock, number = PhaseClock(run), run.finished_steps + 1
    horizon = run.controller.horizon
    with clock("sync"):
        run.sync_weights()
    with clock("rollout"):
        rollouts = run.generate(horizon, number)  # the in-flight gate stops drifting responses
    minibatches = run.minibatches(rollouts)
    batches = [batch for minibatch in minibatches for batch in minibatch]
    with clock("teacher"):
        teacher_hidden = run.teacher_hidden(rollouts)
    with clock("train"):
        stats = run.new_stats(len(rollouts.responses), rollouts.stopped_rows)
        loss = gated_loss(run, teacher_hidden, stats, updates=len(minibatches))
        if len(minibatches) > 1:
            run.trainer.look(batches, loss)  # at the policy that sampled the batch, before it moves
        result = run.trainer.step_through(minibatches, loss)
        stats.reduce(run.layout.reports)
    run.check_updates(result, rollouts)
    if not result.skipped:
        run.controller.update(stats.reliable_length_B, rollouts.length_B, rollouts.finished_B)
    run.finished_steps = number
    run.tracker.step(
        {
            "step": number,
            "horizon": horizon,
            **stats.record(),
            **run.packing_record(rollouts),
            "response_length": rollouts.tokens / len(rollouts.responses),
            "finished_rate": sum(rollouts.finished_B) / len(rollouts.responses),
            **run.inflight_record(rollouts, stats.reliable_length_B),
            **run.long_tail.record(rollouts),
            "lengths_by_position": stats.lengths(rollouts.length_B),
            "rollout_digest": rollouts.digest,
            "tokens_generated": rollouts.generated,
            "tokens_full": run.tokens_at_full_horizon(len(rollouts.responses)),
            "tokens_trained": result.tokens,
            "loss": result.loss,
            "grad_norm": result.grad_norm,
            "weight_norm": run.trainer.weight_norm(),
            "lr": result.lr,
            "updates_skipped": len(minibatches) - result.updates,
            **clock.record(),
        }
    )
    run.tracker.samples(number, horizon, rollouts, stats)


def evaluate(run: Run) -> None:
    """Accuracy of the student as it is now, on held-out problems at the full horizon."""
    if not run.evaluators:
        return
    run.sync_weights()
    run.enter("evaluation")
    generations = run.run_dir / "generations" if run.layout.is_main else None
    keep = run.config.evaluation.generations
    record = evaluation_record(run.engine, run.evaluators, run.finished_steps, generations, keep)
    run.full_response_length = record["eval_response_length"]
    run.tracker.evaluation(record)


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
