"""Self-distillation of the tiny hint student on one core: its own teacher, with the worked solution in the prompt.

Nothing but the student teaches here: as it begins (`teacher=student`), or as the average of what it becomes
(`teacher=ema`). `docs/privileged.md` has what came of it, and the control without a hint. The model does not come with
the package:

    prune-opd sft tiny_hint_student
    prune-opd train tiny_hint
    prune-opd train tiny_hint teacher=ema teacher_ema.decay=0.95
    prune-opd train tiny_hint data.teacher_prompt=null data.max_teacher_prompt_len=null        the control
"""

from dataclasses import replace

from prune_opd.config import DataConfig, EvalConfig, ParallelConfig, RolloutConfig, TrainConfig
from prune_opd.config.paths import tiny_model
from prune_opd.recipes.tiny_compatible import tiny_compatible
from prune_opd.recipes.tiny_hint_student import tiny_hint_student


def tiny_hint() -> TrainConfig:
    base = tiny_compatible()
    return replace(
        base,
        name="tiny_hint",
        student=tiny_model(tiny_hint_student()),
        teacher="student",
        steps=48,
        data=DataConfig(
            source="ledger",
            min_steps=4,
            max_steps=8,
            teacher_prompt="{prompt} {solution} <ask>",
            max_teacher_prompt_len=64,
        ),
        rollout=RolloutConfig(prompts=192, responses=1, max_prompt_len=19),
        horizon=replace(base.horizon, strategy="full", max_len=56, init_len=32),
        parallel=ParallelConfig(nproc=1, tensor=1),
        optimizer=replace(base.optimizer, lr=1e-3, min_lr=1e-4),
        evaluation=EvalConfig(every=12, problems=512),
    )
