"""Distillation of the tiny drift pair on one core, a few minutes: a wrong word, and the rollout rambles to the limit.

The student misremembers an eighth of the register's entries; whoever writes such a word is lost, and the teacher has
nothing to say about a lost text. `docs/drift-pair.md` says what the pair shows and what it does not. Check it with
`prune-opd bench pair-check tiny_drift`.
"""

from dataclasses import replace

from prune_opd.config import GateConfig, OptimizerConfig, ParallelConfig, RolloutConfig, TrainConfig
from prune_opd.config.paths import tiny_model
from prune_opd.recipes.tiny_compatible import tiny_compatible
from prune_opd.recipes.tiny_drift_student import tiny_drift_student
from prune_opd.recipes.tiny_drift_teacher import tiny_drift_teacher


def tiny_drift() -> TrainConfig:
    base = tiny_compatible()
    return replace(
        base,
        name="tiny_drift",
        student=tiny_model(tiny_drift_student()),
        teacher=tiny_model(tiny_drift_teacher()),
        steps=50,
        rollout=RolloutConfig(prompts=24, responses=1, max_prompt_len=96),
        # A right solution has 105 to 205 tokens; what is lost goes on to the limit.
        horizon=replace(base.horizon, max_len=320, init_len=48, step=8, margin=8, finished_rows="miss"),
        gate=GateConfig(k=1, threshold=0.5, w_drop=0.2, w_base=0.0),
        # The models are sharp: at fifty times this rate, the compatible pair's, the wrong words are gone in five steps.
        optimizer=OptimizerConfig(
            lr=6e-6, min_lr=3e-6, schedule="linear", warmup_steps=5, beta2=0.99, weight_decay=0.01, clip_grad=1.0
        ),
        parallel=ParallelConfig(nproc=1, tensor=1),
    )
