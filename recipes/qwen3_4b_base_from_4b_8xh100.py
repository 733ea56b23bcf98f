"""The paper's pair Qwen3-4B-Base ← Qwen3-4B (thinking off) on one node of 8 H100.

Published: 28.5 h for OPD, 13.5 h pruned. A base model seldom stops by itself, so most responses run to the horizon.

The student stops with 151643, the teacher with 151645. Qwen3-1.7B-Base with this teacher is a measured failure
elsewhere (arXiv 2609.20511, sampled-token OPD, budget 7168, 200 updates):
the probability of stopping falls from .87 at step 35 to about 0 at 150, and responses grow to the budget. With the
terminal ids as one outcome they do not. So this recipe, unlike the paper, sets `objective.ends=class`. We have run
neither form. What the paper saves on this pair may be in part such growth (docs/ends.md).
"""

from dataclasses import replace

from prune_opd.config import TrainConfig
from prune_opd.recipes._paper import paper_base


def qwen3_4b_base_from_4b_8xh100() -> TrainConfig:
    base = paper_base(
        "qwen3_4b_base_from_4b_8xh100",
        "Qwen/Qwen3-4B-Base",
        "Qwen/Qwen3-4B",
        init_len=2048,
        response_length=10500,
        mean_horizon=6000,
        thinking=False,
        ends="class",
    )
    # 32 responses of an engine at the full horizon want 426,000 tokens of the KV cache; half of a GPU holds 221,000.
    return replace(base, rollout=replace(base.rollout, gpu_memory_utilization=0.65))
