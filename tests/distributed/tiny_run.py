"""A run without a rollout engine, for the ranks of tests: real student, teacher, optimizer, gate, loss and controller.

What the engine would sample is made up instead, so every layout trains on the same tokens.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prune_opd import platform
from prune_opd.config import (
    DataConfig,
    GateConfig,
    HorizonConfig,
    ObjectiveConfig,
    OptimizerConfig,
    ParallelConfig,
    PrecisionConfig,
    TrackConfig,
    TrainConfig,
)
from prune_opd.data.prompt import Prompt
from prune_opd.rollout.batch import Response, Rollouts
from tests.models import VOCAB, write_model

# Response lengths: one of a single token, an odd number of rows (two data-parallel ranks get 4 and 3), none empty.
LENGTHS = (9, 1, 32, 17, 2, 24, 5)
# A large eps makes Adam's step smooth in the gradient. With the usual one a gradient that is zero but for rounding
# still moves its parameter by the whole learning rate, in a direction that the layout's summation order decides.
OPTIMIZER = OptimizerConfig(lr=1e-2, eps=1e-2, weight_decay=0.1)


def write_pair(folder: Path, **shape: Any) -> None:
    """folder/student and folder/teacher: they agree in part, so the gate has something to do."""
    write_model(folder / "student", seed=1, **shape)
    write_model(folder / "teacher", seed=1, noise=0.15, **shape)


def train_config(folder: Path, tensor: int, **changes: Any) -> TrainConfig:
    settings: dict[str, Any] = {
        "name": "tiny",
        "student": str(folder / "student"),
        "teacher": str(folder / "teacher"),
        "steps": 8,
        "horizon": HorizonConfig(strategy="prune", max_len=32, min_len=4, init_len=16, step=4, margin=2, patience=1),
        "gate": GateConfig(k=8, threshold=0.5, w_drop=0.15),
        "objective": ObjectiveConfig(k=8),
        "optimizer": OPTIMIZER,
        "data": DataConfig(),
        "parallel": ParallelConfig(tensor=tensor),
        "precision": PrecisionConfig(params="fp32"),
        "track": TrackConfig(position_bins=4),
    }
    return TrainConfig(**(settings | changes))


def build_run(config: TrainConfig, layout: Any, run_dir: Path) -> Any:
    """`run.prepare` without an engine, an evaluator and a tracker."""
    from transformers import AutoTokenizer

    from prune_opd.data.prompts import make_sampler
    from prune_opd.megatron.checkpoint import Checkpoints
    from prune_opd.megatron.model import dtype_of
    from prune_opd.megatron.teacher import Teacher
    from prune_opd.megatron.trainer import Trainer
    from prune_opd.method.horizon import make_controller
    from prune_opd.rollout.long_tail import LongTail
    from prune_opd.run import Run
    from prune_opd.track.tracker import NullTracker

    machine, parallel, dtype = platform.prepare(), config.parallel, dtype_of(config.precision.params)
    sampler = make_sampler(config.data, AutoTokenizer.from_pretrained(config.student), config.seed)
    return Run(
        config=config,
        run_dir=run_dir,
        machine=machine,
        layout=layout,
        trainer=Trainer(config.student, config.optimizer, parallel, config.steps, layout, dtype, machine.device),
        teacher=Teacher(config.teacher, layout, dtype, machine.device, parallel.microbatch_tokens),
        engine=None,
        sampler=sampler,
        controller=make_controller(config.horizon),
        checkpoints=Checkpoints(run_dir / "checkpoints", config.checkpoint, layout),
        evaluators=[],
        tracker=NullTracker(),
        long_tail=LongTail(config.rollout, sampler.endless),
    )


def made_up_rollouts(seed: int = 5) -> Rollouts:
    """The same on every rank of every layout."""
    draw = torch.Generator().manual_seed(seed)

    def ids(count: int) -> tuple[int, ...]:
        return tuple(torch.randint(3, VOCAB, (count,), generator=draw).tolist())

    prompts = tuple(Prompt(i, ids(3 + 2 * i), None, "test") for i in range(len(LENGTHS)))
    return Rollouts(prompts, tuple(Response(ids(n), finished=n < 24) for n in LENGTHS))


def train_step(run: Any, rollouts: Rollouts) -> dict[str, Any]:
    """`loop.step` from the teacher pass to the controller; what metrics.jsonl would say."""
    from prune_opd.loop import gated_loss

    minibatches = run.minibatches(rollouts)
    batches = [batch for minibatch in minibatches for batch in minibatch]
    stats = run.new_stats(len(rollouts.responses))
    loss = gated_loss(run, run.teacher.hidden(rollouts, run.deals(rollouts)), stats, updates=len(minibatches))
    if len(minibatches) > 1:
        run.trainer.look(batches, loss)
    result = run.trainer.step_through(minibatches, loss)
    stats.reduce(run.layout.reports)
    run.check_updates(result, rollouts)
    if not result.skipped:
        run.controller.update(stats.reliable_length_B, rollouts.length_B, rollouts.finished_B)
    run.finished_steps += 1
    return {
        **stats.record(),
        "reliable_length_B": stats.reliable_length_B.tolist(),
        "loss": result.loss,
        "grad_norm": result.grad_norm,
        "weight_norm": run.trainer.weight_norm(),
        "sampled_tokens": stats.tokens_W4T.flatten().tolist(),
        "lr": result.lr,
        "tokens": result.tokens,
        "updates": result.updates,
        "microbatches": len(batches),
        "horizon": run.controller.horizon,
    }


def whole_parameters(chunks: Any) -> dict[str, Tensor]:
    """Every parameter as a whole Hugging Face tensor, detached from the model."""
    from prune_opd.weights.stream import hf_stream

    return {name: tensor.clone() for name, tensor in hf_stream(chunks)}
