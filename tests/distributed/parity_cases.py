"""The models and layouts of test_model_parity.py: small enough for two cores, and one of every kind."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from prune_opd.config import ParallelConfig

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 1e4}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
    "rope_theta": 5e4,
}


@dataclass(frozen=True)
class Model:
    family: str
    shape: dict[str, Any] = field(default_factory=dict)
    dtype: str = "float32"
    file_size: str = "50GB"  # of a file of weights


KINDS = {
    "llama": Model("llama", {"rope_parameters": {"rope_theta": 50000.5}}),
    "llama, linear": Model("llama", {"rope_parameters": {"rope_type": "linear", "factor": 3.0, "rope_theta": 1e4}}),
    "llama, llama3": Model("llama", {"rope_parameters": LLAMA3}),
    "qwen2": Model("qwen2"),
    "qwen2, yarn": Model("qwen2", {"rope_parameters": YARN}),
    "qwen3": Model("qwen3", {"rope_parameters": {"rope_theta": 1e6}}, file_size="100KB"),
    "qwen3_moe": Model("qwen3_moe", {"norm_topk_prob": True}),
    # Weights of the chosen experts as they come, an odd number of them, and dense layers among the sparse ones.
    "qwen3_moe, mixed": Model(
        "qwen3_moe",
        {"norm_topk_prob": False, "num_experts_per_tok": 3, "mlp_only_layers": [0], "decoder_sparse_step": 1},
    ),
}
HEADS = ("tied", "untied")
CASES = {f"{kind}, {head}": model for kind, model in KINDS.items() for head in HEADS}
# Of these only the bits of the weights are compared.
BF16 = {
    f"{kind}, {head}, bf16": Model(KINDS[kind].family, KINDS[kind].shape, "bfloat16")
    for kind, head in (("qwen2", "tied"), ("qwen3_moe", "untied"))
}

LAYOUTS: dict[int, dict[str, ParallelConfig]] = {
    1: {"tp1": ParallelConfig(tensor=1)},
    2: {
        "tp2": ParallelConfig(tensor=2),
        "tp2 sp": ParallelConfig(tensor=2, sequence_parallel=True),
        "pp2": ParallelConfig(tensor=1, pipeline=2),
        "pp2 vpp2": ParallelConfig(tensor=1, pipeline=2, virtual_pipeline=2),
        "ep2": ParallelConfig(tensor=1, expert=2),
    },
    4: {
        "tp2 pp2": ParallelConfig(tensor=2, pipeline=2),
        "tp2 ep2": ParallelConfig(tensor=2, expert=2),
        "pp2 ep2": ParallelConfig(tensor=1, pipeline=2, expert=2),
    },
}


def belongs(case: str, layout: str) -> bool:
    """Experts are spread over ranks only where there are some."""
    return "ep2" not in layout or (CASES | BF16)[case].family == "qwen3_moe"


PAIRS = [
    (layout, case) for world in LAYOUTS.values() for layout in world for case in CASES | BF16 if belongs(case, layout)
]
