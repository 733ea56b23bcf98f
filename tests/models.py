"""Tiny Hugging Face directories for the tests: made by transformers, random weights, the ledger's tokenizer.

Everything is there that a directory from a hub has, so transformers, megatron-core and vLLM all load them. Importing
this is cheap; writing a model imports transformers (seconds).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from prune_opd.data import ledger

if TYPE_CHECKING:
    from prune_opd.weights.mapping import Entry

FAMILIES = ("llama", "qwen2", "qwen3", "qwen3_moe")
VOCAB = len(ledger.VOCABULARY)
SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,  # the least that vLLM's CPU attention takes; more than hidden / heads, as in Qwen3
    "max_position_embeddings": 512,
    "bos_token_id": ledger.TOKEN_ID[ledger.BOS],
    "eos_token_id": ledger.TOKEN_ID[ledger.EOS],
    "pad_token_id": ledger.TOKEN_ID[ledger.PAD],
}
EXPERTS: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}


def write_model(
    directory: Path,
    family: str = "qwen3",
    *,
    tied: bool = True,
    seed: int = 0,
    noise: float = 0.0,
    file_size: str = "50GB",
    **shape: Any,
) -> Path:
    """A model directory with weights drawn from `seed`; `shape` replaces settings of its config.

    No weight is left at a constant (transformers starts norms at 1 and biases at 0), so a tensor that is swapped,
    forgotten or cut in the wrong place shows. noise: relative distance from the weights of `seed`, for a teacher that
    agrees with its student here and there. file_size: of each weight file, if there shall be several.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = {**SHAPE, **(EXPERTS if family == "qwen3_moe" else {}), **shape}
    config = AutoConfig.for_model(family, **settings, tie_word_embeddings=tied)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    draw = torch.Generator().manual_seed(seed)
    other = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            start, scale = _distribution(name, parameter)
            normal = torch.randn(parameter.shape, generator=draw)
            normal += noise * torch.randn(parameter.shape, generator=other)
            parameter.copy_(start + scale * normal)
    model.save_pretrained(directory, max_shard_size=file_size)
    ledger.save_tokenizer(directory)
    return directory


def tensors_of(directory: Path) -> dict[str, torch.Tensor]:
    """All weights of a model directory, from one file or several."""
    from safetensors.torch import load_file

    return {name: tensor for path in directory.glob("*.safetensors") for name, tensor in load_file(path).items()}


def merged(entry: Entry, shards: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
    """The Hugging Face tensors of a megatron parameter, whole and contiguous, from every rank's shard in order."""
    wholes = [shards[0].new_empty(shape) for shape in entry.shapes]
    count = len(shards) if entry.cut.divided else 1
    for index, shard in enumerate(shards[:count]):
        parts = entry.cut.parts(shard, entry.shapes, index, count)
        for part, place in zip(parts, entry.cut.slices(wholes, index, count), strict=True):
            place.copy_(part)
    return dict(zip(entry.hf, wholes, strict=True))


def _distribution(name: str, parameter: torch.Tensor) -> tuple[float, float]:
    """(mean, standard deviation): hidden states and logits of a few units, and different at every position."""
    if "norm" in name:
        return 1.0, 0.2
    if name.endswith("bias"):
        return 0.0, 0.5
    if "embed" in name or "lm_head" in name:
        return 0.0, 0.2  # small beside what the layers add: a tied model would repeat its input
    return 0.0, parameter.shape[-1] ** -0.5
