"""Qwen3-8B ← Qwen3-32B on 4 nodes of 8 H100, FP8 in both models and in the rollouts.

The student lies on two GPUs, the teacher on eight. The first and the last layer stay in bf16, and γ is the paper's:
FP8's own noise makes next to no events there on the tiny pair (docs/megatron.md); measure your own.
"""

from dataclasses import replace

from prune_opd.config import TrainConfig
from prune_opd.recipes._large import large_base


def qwen3_8b_from_32b_32xh100_fp8() -> TrainConfig:
    base = large_base("qwen3_8b_from_32b_32xh100_fp8", "Qwen/Qwen3-8B", "Qwen/Qwen3-32B", nodes=4)
    return replace(
        base,
        rollout=replace(base.rollout, prompts=256),
        parallel=replace(base.parallel, tensor=2, sequence_parallel=True, teacher_tensor=8),
    )
