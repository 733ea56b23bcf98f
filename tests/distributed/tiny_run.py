"""A run without a rollout engine, for the ranks of tests: real student, teacher, optimizer, gate, loss and controller.

What the engine would sample is made up instead, so every layout trains on the same tokens.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace
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
    SurvivalConfig,
    TrackConfig,
    TrainConfig,
)
from prune_opd.config.teacher import EMA
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
        "survival": SurvivalConfig(teacher_test=0),  # the models are random
    }
    return TrainConfig(**(settings | changes))


@functools.cache
def tokenizer_of(model: str) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model)


def build_run(config: TrainConfig, layout: Any, run_dir: Path) -> Any:
    """`run.prepare` without an engine, an evaluator and a tracker."""
    from prune_opd.data.prompts import make_sampler
    from prune_opd.megatron.average import MovingAverage
    from prune_opd.megatron.checkpoint import Checkpoints
    from prune_opd.megatron.model import dtype_of
    from prune_opd.megatron.sync import WeightSync
    from prune_opd.megatron.teachers import build_teachers
    from prune_opd.megatron.trainer import Trainer, Tuning
    from prune_opd.method.by_teacher import CalibrationByTeacher, HorizonByTeacher
    from prune_opd.method.calibration import Calibration
    from prune_opd.method.horizon import make_controller
    from prune_opd.rollout.phase import RolloutPhase
    from prune_opd.run import Phases, Run

    machine, dtype = platform.prepare(), dtype_of(config.precision.params)
    sampler = make_sampler(config.data, tokenizer_of(config.student), config.seed)
    tuning, steps, parallel = Tuning(lora=config.lora, seed=config.seed), config.steps, config.parallel
    trainer = Trainer(config.student, config.optimizer, parallel, steps, layout, dtype, machine.device, tuning)
    teacher: Any = build_teachers(config, layout, dtype, machine, run_dir).teacher
    if config.teacher == EMA:
        trainer.average = MovingAverage(teacher, trainer.chunks, config.teacher_ema.decay, config.rollout.bucket_mb)
    no_engine: Any = None
    rollout, phases = RolloutPhase(config, no_engine, sampler), Phases()
    return Run(
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
        phases=phases,
    )


def made_up_rollouts(seed: int = 5, hints: Sequence[int] = ()) -> Rollouts:
    """The same on every rank of every layout. hints: tokens of what the teacher reads before each row; 0: no hint."""
    draw = torch.Generator().manual_seed(seed)

    def ids(count: int) -> tuple[int, ...]:
        return tuple(torch.randint(3, VOCAB, (count,), generator=draw).tolist())

    prompts = tuple(Prompt(i, ids(3 + 2 * i), None, "test") for i in range(len(LENGTHS)))
    responses = tuple(Response(ids(n), finished=n < 24) for n in LENGTHS)
    hinted = zip(prompts, hints or [0] * len(prompts), strict=True)
    return Rollouts(tuple(replace(prompt, teacher_ids=ids(n) if n else None) for prompt, n in hinted), responses)


def train_step(run: Any, rollouts: Rollouts) -> dict[str, Any]:
    """The loop's own step, once the rollouts are there; what metrics.jsonl would say, and some more."""
    from prune_opd.loop import train_on
    from prune_opd.track.clock import PhaseClock

    clock = PhaseClock(run.machine, run.phases.enter)
    batch = run.train_batch(rollouts, clock)
    result, stats = train_on(run, batch, clock)
    return {
        **stats.record(),
        **run.teacher_record(stats, rollouts),
        **(run.controller.record() if run.config.teachers else {}),
        **batch.record(),
        "reliable_length_B": stats.reliable_length_B.tolist(),
        "loss": result.loss,
        "grad_norm": result.grad_norm,
        "weight_norm": run.trainer.weight_norm(),
        "sampled_tokens": stats.tokens_W4T.flatten().tolist(),
        "lr": result.lr,
        "tokens": result.tokens,
        "updates": result.updates,
        "microbatches": len(batch.microbatches),
        "horizon": run.controller.horizon,
        "phases": [key.removeprefix("time_") for key in clock.measured if key.startswith("time_")],
    }


def look(run: Any, rollouts: Rollouts, kept: Any = None) -> Any:
    """What the gate of the loss sees of the rollouts; no update is made. kept: as `Teacher.hidden` takes it."""
    from prune_opd.loss.training_loss import ThisStep, gated_loss

    batch, stats = run.train_batch(rollouts), run.new_stats(rollouts)
    hidden = run.teacher.hidden(rollouts, batch.deals, kept)
    this, group = ThisStep(usual=run.calibration.usual, taught=run.taught(rollouts)), run.layout.student.tp_group
    loss = gated_loss(run.config, run.teacher, hidden, run.vocab_size, group, stats, this)
    run.trainer.look(batch.microbatches, loss)
    stats.reduce(run.layout.reports)
    return stats


def whole_parameters(chunks: Any) -> dict[str, Tensor]:
    """Every parameter as a whole Hugging Face tensor, detached from the model."""
    from prune_opd.weights.stream import Resharder

    return {name: tensor.clone() for name, tensor in Resharder(chunks, in_order=True).stream()}
