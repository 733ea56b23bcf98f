"""What a Hugging Face config.json says of a model, and whether this project builds such a model. No torch in here."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prune_opd.errors import ConfigError

VOCAB_MULTIPLE = 128  # rows of the vocabulary matrices per tensor-parallel rank: GEMM sizes that H100 likes
FAMILIES = ("llama", "qwen2", "qwen3")
# Settings of a Hugging Face config that change the mathematics, and the one value of each that is built here.
# (attention_bias of Llama and Qwen3 also puts a bias on o_proj; Qwen2's bias on q, k and v is not a setting.)
BUILT = {"attention_bias": False, "mlp_bias": False, "hidden_act": "silu", "use_sliding_window": False}


def not_built(config: dict[str, Any]) -> str | None:
    """Which setting of a config.json this project does not build, and what would do; None if there is none."""
    family = config.get("model_type")
    if family not in FAMILIES:
        return f"model_type = {family!r} is not supported: use a model of {', '.join(FAMILIES)}"
    scaling = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    scaling_type = scaling.get("rope_type", scaling.get("type", "default"))  # "type" is the older name
    if scaling_type != "default":
        return f"rope_type = {scaling_type!r} is not supported yet: use a model with the default rope"
    for name, built in BUILT.items():
        if config.get(name, built) != built:
            return f"{name} = {config[name]!r} is not supported yet: use a model with {built!r}"
    return None


@dataclass(frozen=True)
class ModelSpec:
    """What the two worlds must agree on, read from a Hugging Face config.json (Llama, Qwen2, Qwen3; dense)."""

    family: str
    layers: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab_size: int
    max_positions: int
    rope_theta: float
    norm_eps: float
    tied: bool
    qkv_bias: bool
    qk_norm: bool

    @classmethod
    def read(cls, model_dir: str | Path) -> ModelSpec:
        """Raises `ConfigError` for a model that this project does not build."""
        path = Path(model_dir) / "config.json"
        hf = json.loads(path.read_text())
        if problem := not_built(hf):
            raise ConfigError(f"{path}: {problem}")
        family, rope = hf["model_type"], hf.get("rope_parameters") or {}
        return cls(
            family=family,
            layers=hf["num_hidden_layers"],
            hidden=hf["hidden_size"],
            ffn=hf["intermediate_size"],
            heads=hf["num_attention_heads"],
            kv_heads=hf.get("num_key_value_heads", hf["num_attention_heads"]),
            head_dim=hf.get("head_dim") or hf["hidden_size"] // hf["num_attention_heads"],
            vocab_size=hf["vocab_size"],
            max_positions=hf["max_position_embeddings"],
            rope_theta=float(rope.get("rope_theta", hf.get("rope_theta", 10000.0))),
            norm_eps=hf["rms_norm_eps"],
            tied=hf.get("tie_word_embeddings", False),
            qkv_bias=family == "qwen2",
            qk_norm=family == "qwen3",
        )

    def padded_vocab(self, tp_size: int) -> int:
        multiple = VOCAB_MULTIPLE * tp_size
        return -(-self.vocab_size // multiple) * multiple
