"""Qwen3-30B-A3B ← Qwen3-235B-A22B, mixtures of experts, on 16 nodes of 8 H100, FP8 in both models and in the rollouts.

Experts are shared out whole: the student's over 8 ranks, the teacher's over 32; everything else is cut over 4.
"""

from dataclasses import replace

from prune_opd.config import TrainConfig
from prune_opd.recipes._large import large_base


def qwen3_30b_a3b_from_235b_a22b_128xh100_fp8() -> TrainConfig:
    name = "qwen3_30b_a3b_from_235b_a22b_128xh100_fp8"
    base = large_base(name, "Qwen/Qwen3-30B-A3B", "Qwen/Qwen3-235B-A22B", nodes=16)
    return replace(
        base,
        # Buckets of two layers: each of the eight ranks that share the experts sends its part of one in one piece.
        # Experts of 768 columns over four ranks are no whole blocks of 128, so one scale for each matrix.
        rollout=replace(
            base.rollout,
            prompts=512,
            tensor_parallel=4,
            gpu_memory_utilization=0.4,
            bucket_mb=2560,
            quantization="fp8_per_tensor",
        ),
        parallel=replace(base.parallel, tensor=4, sequence_parallel=True, expert=8, teacher_expert=32),
        memory=replace(base.memory, offload_optimizer=True),
    )
