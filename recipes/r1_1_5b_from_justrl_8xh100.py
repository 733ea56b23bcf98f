"""The paper's pair R1-Distill-Qwen-1.5B ← JustRL-DeepSeek-1.5B on one node of 8 H100: drifts at first, then opens.

Published: 6.9 h for OPD, 4.1 h pruned; the window stays near 1K tokens for 50 steps and reaches about 7K.
"""

from prune_opd.config import TrainConfig
from prune_opd.recipes._paper import paper_base


def r1_1_5b_from_justrl_8xh100() -> TrainConfig:
    return paper_base(
        "r1_1_5b_from_justrl_8xh100",
        "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B",
        "hbx/JustRL-DeepSeek-1.5B",
        init_len=1024,
        response_length=5500,
        mean_horizon=3280,
    )
