"""Rotary frequencies are those of transformers, bit for bit, for every kind that is built."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from prune_opd.megatron.rope import attention_scale, inverse_frequencies
from prune_opd.model_spec import ModelSpec

CONFIG = {
    "model_type": "llama",
    "num_hidden_layers": 2,
    "hidden_size": 256,
    "intermediate_size": 96,
    "num_attention_heads": 2,
    "vocab_size": 300,
    "max_position_embeddings": 8192,
}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096}
# As published configs have them, in the older and the newer place, and every setting of its own once.
KINDS: dict[str, dict[str, Any]] = {
    "default": {"rope_theta": 1e6},
    "fractional theta": {"rope_theta": 10000.5},
    "linear": {"rope_scaling": {"type": "linear", "factor": 2.5}},
    "llama3": {"rope_theta": 5e5, "rope_scaling": {**LLAMA3, "original_max_position_embeddings": 1024}},
    "llama3 band": {"rope_parameters": {**LLAMA3, "rope_theta": 5e5, "low_freq_factor": 2.0, "high_freq_factor": 9.0}},
    "yarn": {"rope_theta": 1e6, "rope_scaling": {"type": "yarn", **YARN}},
    "yarn of Qwen2.5": {"model_type": "qwen2", "num_key_value_heads": 2, "rope_scaling": YARN, "rope_theta": 1e6},
    "yarn, no truncation": {"rope_parameters": {**YARN, "rope_theta": 1e4, "truncate": False}},
    "yarn, betas": {"rope_parameters": {**YARN, "rope_theta": 1e4, "beta_fast": 20, "beta_slow": 2}},
    "yarn, attention_factor": {"rope_parameters": {**YARN, "rope_theta": 1e4, "attention_factor": 1.7}},
    "yarn, mscale": {"rope_parameters": {**YARN, "rope_theta": 1e4, "mscale": 1.0, "mscale_all_dim": 0.5}},
    "yarn, factor 1": {"rope_parameters": {**YARN, "rope_theta": 1e4, "factor": 1.0}},
}


@pytest.mark.parametrize("settings", KINDS.values(), ids=KINDS)
def test_frequencies_and_scale_equal_those_of_transformers(tmp_path: Path, settings: dict[str, Any]) -> None:
    from transformers import AutoConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    (tmp_path / "config.json").write_text(json.dumps(CONFIG | settings))
    spec = ModelSpec.read(tmp_path)
    theirs = LlamaRotaryEmbedding(AutoConfig.from_pretrained(tmp_path))
    assert torch.equal(inverse_frequencies(spec.rope, spec.head_dim), theirs.inv_freq)
    assert spec.rope.attention_factor == theirs.attention_scaling
    scale = attention_scale(spec)
    assert (scale or spec.head_dim**-0.5) == pytest.approx(theirs.attention_scaling**2 * spec.head_dim**-0.5)


def test_the_kinds_differ_from_each_other() -> None:
    """Or the comparison above would compare nothing."""
    from prune_opd.model_spec import RopeSpec

    stretched = {"factor": 4.0, "original_positions": 1024}
    kinds = [RopeSpec(1e4, kind, **stretched) for kind in ("default", "linear", "llama3", "yarn")]
    frequencies = [tuple(inverse_frequencies(rope, 128).tolist()) for rope in kinds]
    assert len(set(frequencies)) == len(kinds)
