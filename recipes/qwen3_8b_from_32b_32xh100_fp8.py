"""Qwen3-8B ← Qwen3-32B on 4 nodes of 8 H100, FP8 in both models and in the rollouts.

The student lies on two GPUs, the teacher on eight. The first and the last layer stay in bf16, and γ is the paper's:
FP8's own noise makes next to no events there on the tiny pair (docs/megatron.md); measure your own.
"""

from dataclasses import replace

from prune_opd.config import (
    Fp8Config,
    ParallelConfig,
    PlanningConfig,
    PrecisionConfig,
    RolloutConfig,
    TrainConfig,
)
from recipes._paper import paper_base

FP8 = Fp8Config(format="hybrid", recipe="blockwise", first_layers_bf16=1, last_layers_bf16=1)


def qwen3_8b_from_32b_32xh100_fp8() -> TrainConfig:
    base = paper_base(
        "qwen3_8b_from_32b_32xh100_fp8",
        "Qwen/Qwen3-8B",
        "Qwen/Qwen3-32B",
        init_len=2048,
        response_length=7500,
        mean_horizon=6144,
    )
    return replace(
        base,
        rollout=RolloutConfig(
            prompts=256, responses=4, max_prompt_len=1024, quantization="fp8", gpu_memory_utilization=0.5
        ),
        parallel=ParallelConfig(
            nproc=8,
            tensor=2,
            sequence_parallel=True,
            teacher_tensor=8,
            distributed_optimizer=True,
            recompute="full",
        ),
        precision=PrecisionConfig(params="bf16", student_fp8=FP8, teacher_fp8=FP8),
        planning=PlanningConfig(gpu="h100", nodes=4, response_length=7500, mean_horizon=6144),
    )
