"""The paper's pair R1-Distill-Qwen-1.5B ← R1-Distill-Qwen-7B on one node of 8 H100: a larger teacher, early drift.

Published: 12.5 h for OPD, 4.0 h pruned, the most that any pair saves.
"""

from prune_opd.config import TrainConfig
from prune_opd.recipes._paper import paper_base


def r1_1_5b_from_r1_7b_8xh100() -> TrainConfig:
    return paper_base(
        "r1_1_5b_from_r1_7b_8xh100",
        "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B",
        "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B",
        init_len=2048,
        response_length=9000,
        mean_horizon=2500,
    )
