"""Settings of adapters: what is refused, and with which words."""

from __future__ import annotations

import pytest

from prune_opd.config import LoraConfig
from prune_opd.config.lora import TARGETS
from prune_opd.errors import ConfigError


def test_the_default_is_no_adapter() -> None:
    assert not LoraConfig().on
    assert LoraConfig(rank=8, alpha=16.0).scale == 2.0
    assert LoraConfig(rank=8).targets == TARGETS


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"rank": 8, "dropout": 0.1}, r"lora\.dropout = 0\.1: .*set lora\.dropout=0"),
        ({"rank": 8, "targets": ("linear_fc3",)}, r"lora\.targets has 'linear_fc3', .*choose of linear_qkv"),
        ({"rank": 8, "targets": ("q_proj",)}, r"'q_proj', .*q_proj is a part of linear_qkv"),
        ({"rank": 8, "targets": ("lm_head",)}, r"'lm_head', .*embedding and output head stay as they are"),
        ({"rank": 8, "targets": ()}, r"lora\.targets = \[\]: name each layer once"),
        ({"rank": 8, "targets": ("linear_qkv", "linear_qkv")}, r"name each layer once"),
        ({"rank": -1}, r"lora\.rank = -1 is out of range"),
        ({"rank": 8, "alpha": 0.0}, r"lora\.alpha = 0\.0 is out of range"),
        ({"alpha": 16.0}, r"lora\.alpha = 16\.0 does nothing with lora\.rank = 0"),
        ({"targets": ("linear_qkv",)}, r"lora\.targets = .* does nothing with lora\.rank = 0"),
    ],
)
def test_bad_settings_are_refused_by_name(settings: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        LoraConfig(**settings)  # type: ignore[arg-type]
