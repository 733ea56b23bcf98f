"""Prune-OPD of the tiny compatible pair on two CPU cores: the quickstart, a few minutes from start to report.

The student forgets carries, the teacher does not. Their overlap is high, so the window opens from 64 tokens to its
maximum by itself and the run ends where full rollouts end. The values that the other strategies need are set too:

    prune-opd train tiny_compatible horizon.strategy=topd      a quarter of the maximum, fixed
    prune-opd train tiny_compatible horizon.strategy=popd      64 tokens, 16 more every 3 steps
    prune-opd train tiny_compatible horizon.strategy=full      the control
"""

from prune_opd.config import (
    CheckpointConfig,
    DataConfig,
    EvalConfig,
    GateConfig,
    HorizonConfig,
    ObjectiveConfig,
    OptimizerConfig,
    ParallelConfig,
    PrecisionConfig,
    RolloutConfig,
    TrainConfig,
)
from prune_opd.config.paths import tiny_model
from prune_opd.recipes.tiny_student import tiny_student
from prune_opd.recipes.tiny_teacher import tiny_teacher


def tiny_compatible() -> TrainConfig:
    return TrainConfig(
        name="tiny_compatible",
        student=tiny_model(tiny_student()),
        teacher=tiny_model(tiny_teacher()),
        steps=40,
        data=DataConfig(source="ledger", min_steps=20, max_steps=40),
        rollout=RolloutConfig(prompts=32, responses=1, max_prompt_len=96),
        horizon=HorizonConfig(
            strategy="prune",
            max_len=216,
            min_len=32,
            init_len=64,
            step=16,
            margin=16,
            patience=3,
            hit_ratio=0.1,
            finished_rows="hit_if_reliable",
            rho=0.25,  # topd
            increment=16,  # popd, with interval and init_len
            interval=3,
        ),
        # In a vocabulary of 199, k = 16 and γ = .7 lie in the noise of the tail; w_base = 0 really prunes it.
        gate=GateConfig(k=4, threshold=0.5, w_drop=0.2, w_base=0.0),
        objective=ObjectiveConfig(k=16),
        optimizer=OptimizerConfig(
            lr=3e-4, min_lr=3e-5, schedule="linear", warmup_steps=10, beta2=0.99, weight_decay=0.01, clip_grad=1.0
        ),
        parallel=ParallelConfig(nproc=2, tensor=None),
        precision=PrecisionConfig(params="fp32"),
        evaluation=EvalConfig(every=10, problems=256),
        checkpoint=CheckpointConfig(every=20),
    )
