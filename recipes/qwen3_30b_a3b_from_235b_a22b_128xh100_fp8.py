"""Qwen3-30B-A3B ← Qwen3-235B-A22B, mixtures of experts, on 16 nodes of 8 H100, FP8 in both models and in the rollouts.

Experts are shared out whole: the student's over 8 ranks, the teacher's over 32; everything else is cut over 4.
"""

from dataclasses import replace

from prune_opd.config import (
    Fp8Config,
    MemoryConfig,
    ParallelConfig,
    PlanningConfig,
    PrecisionConfig,
    RolloutConfig,
    TrainConfig,
)
from recipes._paper import paper_base

FP8 = Fp8Config(format="hybrid", recipe="blockwise", first_layers_bf16=1, last_layers_bf16=1)


def qwen3_30b_a3b_from_235b_a22b_128xh100_fp8() -> TrainConfig:
    base = paper_base(
        "qwen3_30b_a3b_from_235b_a22b_128xh100_fp8",
        "Qwen/Qwen3-30B-A3B",
        "Qwen/Qwen3-235B-A22B",
        init_len=2048,
        response_length=7500,
        mean_horizon=6144,
    )
    return replace(
        base,
        rollout=RolloutConfig(
            prompts=512,
            responses=4,
            max_prompt_len=1024,
            tensor_parallel=4,
            quantization="fp8",
            gpu_memory_utilization=0.4,
        ),
        parallel=ParallelConfig(
            nproc=8,
            tensor=4,
            sequence_parallel=True,
            expert=8,
            teacher_expert=32,
            distributed_optimizer=True,
            recompute="full",
        ),
        precision=PrecisionConfig(params="bf16", student_fp8=FP8, teacher_fp8=FP8),
        memory=MemoryConfig(sleep_level=2, offload_gradients=True, offload_optimizer=True),
        planning=PlanningConfig(gpu="h100", nodes=16, response_length=7500, mean_horizon=6144),
    )
