"""The models of test_te_spec.py: every family, and what only some of them have."""

from __future__ import annotations

from prune_opd.config import LoraConfig
from tests.distributed.parity_cases import KINDS, Model

CASES = {
    "llama": (KINDS["llama"], False),
    "qwen2": (Model("qwen2", KINDS["qwen2, yarn"].shape, "bfloat16"), True),
    "qwen3": (KINDS["qwen3"], True),
    "qwen3_moe": (Model("qwen3_moe", KINDS["qwen3_moe"].shape, "bfloat16"), False),
    "qwen3_moe, mixed": (KINDS["qwen3_moe, mixed"], False),
}  # model, whether its embeddings are tied
ADAPTERS = {"qwen3": LoraConfig(rank=4), "qwen3_moe": LoraConfig(rank=4, targets=("linear_qkv", "linear_proj"))}
