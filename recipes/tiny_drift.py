"""Distillation of the tiny drift pair on one core, a few minutes: rollouts leave what the teacher knows and stay there.

The student loses the litany with its first odd word and the teacher does not follow; `docs/drift-pair.md` says what the
pair shows and what it does not. Check it with `prune-opd bench pair-check tiny_drift`.
"""

from dataclasses import replace

from prune_opd.config import GateConfig, OptimizerConfig, ParallelConfig, RolloutConfig, TrainConfig
from recipes.tiny_compatible import tiny_compatible
from recipes.tiny_drift_student import tiny_drift_student
from recipes.tiny_drift_teacher import tiny_drift_teacher


def tiny_drift() -> TrainConfig:
    base = tiny_compatible()
    return replace(
        base,
        name="tiny_drift",
        student=tiny_drift_student().output,
        teacher=tiny_drift_teacher().output,
        steps=50,
        data=replace(base.data, min_steps=32),
        rollout=RolloutConfig(prompts=24, responses=1, max_prompt_len=96),
        horizon=replace(base.horizon, init_len=48, step=8, margin=8, finished_rows="miss"),
        gate=GateConfig(k=1, threshold=0.5, w_drop=0.2, w_base=0.0),
        optimizer=OptimizerConfig(
            lr=1e-4, min_lr=1e-5, schedule="linear", warmup_steps=10, beta2=0.99, weight_decay=0.01, clip_grad=1.0
        ),
        parallel=ParallelConfig(nproc=1, tensor=1),
    )
