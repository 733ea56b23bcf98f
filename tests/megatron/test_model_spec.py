"""What a Hugging Face config may say: read it right, or refuse it, but never build another model than it describes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from prune_opd import platform
from prune_opd.errors import ConfigError

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
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rope_type = 'llama3'"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type = 'linear'"),  # the key's older name
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6}}, "rope_type = 'yarn'"),
        ({"attention_bias": True}, "attention_bias = True"),  # it has a bias on o_proj, too
        ({"mlp_bias": True}, "mlp_bias = True"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ({"model_type": "qwen2", "use_sliding_window": True}, "use_sliding_window = True"),
    ],
)
def test_a_config_that_is_not_built_is_refused_by_name(tmp_path: Path, settings: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named) as raised:
        read(tmp_path, **settings)
    assert str(tmp_path / "config.json") in str(raised.value)


def test_settings_that_change_nothing_are_read_over(tmp_path: Path) -> None:
    """As real configs have them: no rope scaling spelt as null, a sliding window that is switched off."""
    quiet = {"rope_scaling": None, "use_sliding_window": False, "sliding_window": 4096, "attention_bias": False}
    assert read(tmp_path, **quiet, mlp_bias=False, hidden_act="silu") == read(tmp_path)


def test_what_a_config_leaves_out_has_the_defaults_of_transformers(tmp_path: Path) -> None:
    spec = read(tmp_path)
    assert (spec.kv_heads, spec.head_dim, spec.rope_theta, spec.tied) == (4, 16, 10000.0, False)


@pytest.mark.parametrize("where", ["rope_theta", "rope_parameters"])
def test_rope_theta_is_read_from_its_old_and_its_new_place(tmp_path: Path, where: str) -> None:
    theta = {"rope_theta": 5e5}
    assert read(tmp_path, **(theta if where == "rope_theta" else {where: theta})).rope_theta == 5e5


@pytest.mark.parametrize(("tp_size", "rows"), [(1, 384), (2, 512), (4, 512), (8, 1024)])
def test_the_padded_vocabulary_gives_every_rank_a_multiple_of_128_rows(tmp_path: Path, tp_size: int, rows: int) -> None:
    assert read(tmp_path).padded_vocab(tp_size) == rows
