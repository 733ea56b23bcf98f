"""The paper's pair Qwen3-4B-Base ← Qwen3-4B (thinking off) on one node of 8 H100.

Published: 28.5 h for OPD, 13.5 h pruned. A base model seldom stops by itself, so most responses run to the horizon.
"""

from prune_opd.config import TrainConfig
from prune_opd.recipes._paper import paper_base


def qwen3_4b_base_from_4b_8xh100() -> TrainConfig:
    return paper_base(
        "qwen3_4b_base_from_4b_8xh100",
        "Qwen/Qwen3-4B-Base",
        "Qwen/Qwen3-4B",
        init_len=2048,
        response_length=10500,
        mean_horizon=6000,
        thinking=False,
    )
