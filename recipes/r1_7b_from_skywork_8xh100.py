"""The paper's pair R1-Distill-Qwen-7B ← Skywork-OR1-7B on one node of 8 H100: compatible, so the window opens fully.

Published: 17.5 h for OPD, 17.0 h pruned; the window goes from 6K to its maximum. Each model lies on two GPUs.
"""

from dataclasses import replace

from prune_opd.config import ParallelConfig, TrainConfig
from prune_opd.recipes._paper import paper_base


def r1_7b_from_skywork_8xh100() -> TrainConfig:
    base = paper_base(
        "r1_7b_from_skywork_8xh100",
        "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B",
        "Skywork/Skywork-OR1-7B",
        init_len=6144,
        response_length=6000,
        mean_horizon=9216,
    )
    return replace(
        base,
        parallel=ParallelConfig(
            nproc=8, tensor=2, sequence_parallel=True, distributed_optimizer=True, recompute="full"
        ),
    )
