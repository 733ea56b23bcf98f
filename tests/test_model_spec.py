"""Hugging Face configs are read correctly or refused: the model that is built is always the one they describe."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from prune_opd import platform
from prune_opd.errors import ConfigError
from prune_opd.model_spec import FAMILIES

CONFIG = {
    "model_type": "llama",
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "vocab_size": 300,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
}


def read(folder: Path, **settings: Any) -> Any:
    platform.prepare()
    from prune_opd.model_spec import ModelSpec

    (folder / "config.json").write_text(json.dumps(CONFIG | settings))
    return ModelSpec.read(folder)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"model_type": "gemma2"}, "model_type = 'gemma2' is not supported"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 8.0}}, "rope_type = 'dynamic'"),
        ({"rope_scaling": {"type": "longrope", "short_factor": [1.0]}}, "rope_type = 'longrope'"),  # the older name
        ({"rope_parameters": {"rope_type": "mrope", "rope_theta": 1e6}}, "rope_type = 'mrope'"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "factor = None beside rope_type = 'yarn': it must be a number"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor = None"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5"),
        ({"rope_parameters": {"rope_theta": 1e6, "partial_rotary_factor": 0.5}}, "partial_rotary_factor = 0.5"),
        ({"attention_bias": True}, "attention_bias = True"),  # it has a bias on o_proj, too
        ({"mlp_bias": True}, "mlp_bias = True"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config = {'quant_method': 'fp8'}"),
        ({"model_type": "qwen2", "use_sliding_window": True}, "use_sliding_window = True"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types has sliding_attention"),
        ({"model_type": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 5}, "num_experts_per_tok = 5"),
        ({"model_type": "qwen3_moe", "num_experts_per_tok": 1, "norm_topk_prob": True}, "norm_topk_prob = True"),
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"num_key_value_heads": 3}, "num_key_value_heads = 3 does not divide num_attention_heads"),
        ({"model_type": "qwen3", "num_key_value_heads": None}, "num_key_value_heads = 32 does not divide"),
        ({"num_key_value_heads": 0}, "num_key_value_heads = 0 does not divide"),
    ],
)
def test_a_config_that_is_not_built_is_refused_by_name(tmp_path: Path, settings: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(named)) as raised:
        read(tmp_path, **settings)
    assert str(tmp_path / "config.json") in str(raised.value)


def test_settings_that_change_nothing_are_read_over(tmp_path: Path) -> None:
    """As in real configs: rope scaling that is null, a sliding window that is switched off."""
    quiet = {"rope_scaling": None, "use_sliding_window": False, "sliding_window": 4096, "attention_bias": False}
    layers = {"layer_types": ["full_attention", "full_attention"], "head_dim": None}
    assert read(tmp_path, **quiet, **layers, mlp_bias=False, hidden_act="silu") == read(tmp_path)


def test_qwen2_looks_at_no_attention_bias(tmp_path: Path) -> None:
    """transformers' Qwen2 has its bias on q, k and v whatever the config says."""
    qwen2 = {"model_type": "qwen2", "num_key_value_heads": 2}
    assert read(tmp_path, **qwen2, attention_bias=True) == read(tmp_path, **qwen2)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_a_config_leaves_out_has_the_defaults_of_transformers(tmp_path: Path, family: str) -> None:
    from transformers import AutoConfig

    heads = {"num_attention_heads": 64, "hidden_size": 4096}
    spec = read(tmp_path, model_type=family, **heads)
    theirs = AutoConfig.from_pretrained(tmp_path)
    assert spec.kv_heads == theirs.num_key_value_heads
    assert spec.head_dim == (getattr(theirs, "head_dim", None) or 4096 // 64)
    assert (spec.rope.theta, spec.tied) == (theirs.rope_parameters["rope_theta"], theirs.tie_word_embeddings)
    if family == "qwen3_moe":
        assert (spec.moe.experts, spec.moe.per_token) == (theirs.num_experts, theirs.num_experts_per_tok)
        assert (spec.moe.ffn, spec.moe.normalised) == (theirs.moe_intermediate_size, theirs.norm_topk_prob)


@pytest.mark.parametrize("name", ["num_experts", "num_local_experts"])
def test_the_number_of_experts_is_read_under_both_names(tmp_path: Path, name: str) -> None:
    assert read(tmp_path, model_type="qwen3_moe", **{name: 12}).moe.experts == 12


@pytest.mark.parametrize(
    ("settings", "sparse"),
    [
        ({}, (True, True, True, True)),
        ({"decoder_sparse_step": 2}, (False, True, False, True)),
        ({"mlp_only_layers": [0, 3]}, (False, True, True, False)),
        ({"decoder_sparse_step": 2, "mlp_only_layers": [1]}, (False, False, False, True)),
    ],
)
def test_dense_layers_among_sparse_ones_are_those_that_transformers_makes_dense(
    tmp_path: Path, settings: dict[str, Any], sparse: tuple[bool, ...]
) -> None:
    spec = read(tmp_path, model_type="qwen3_moe", num_hidden_layers=4, **settings)
    assert tuple(spec.is_sparse(layer) for layer in range(4)) == sparse


@pytest.mark.parametrize("settings", [{"mlp_only_layers": [0, 1]}, {"num_experts": 0}, {"decoder_sparse_step": 3}])
def test_a_model_without_a_sparse_layer_has_no_experts(tmp_path: Path, settings: dict[str, Any]) -> None:
    assert read(tmp_path, model_type="qwen3_moe", **settings).moe is None


@pytest.mark.parametrize("where", ["rope_theta", "rope_parameters"])
def test_rope_theta_is_read_from_its_old_and_its_new_place(tmp_path: Path, where: str) -> None:
    theta = {"rope_theta": 5e5}
    assert read(tmp_path, **(theta if where == "rope_theta" else {where: theta})).rope.theta == 5e5


@pytest.mark.parametrize(("tp_size", "rows"), [(1, 384), (2, 512), (4, 512), (8, 1024)])
def test_the_padded_vocabulary_gives_every_rank_a_multiple_of_128_rows(tmp_path: Path, tp_size: int, rows: int) -> None:
    assert read(tmp_path).padded_vocab(tp_size) == rows
