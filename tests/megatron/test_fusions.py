"""Fused kernels are asked for where they are, and nowhere else: megatron-core refuses what it does not find."""

from __future__ import annotations

from pathlib import Path

import pytest

from prune_opd import platform

platform.prepare()

from prune_opd.megatron.model import APEX_KERNEL, fusions, gradient_fusion  # noqa: E402


def test_transformer_engines_kernels_are_used_where_it_is_installed() -> None:
    assert fusions(engine=True, experts=True) == {
        "apply_rope_fusion": True,
        "bias_activation_fusion": True,
        "moe_permute_fusion": True,
    }
    assert not fusions(engine=True, experts=False)["moe_permute_fusion"]
    assert not any(fusions(engine=False, experts=True).values())


def test_gradients_are_fused_where_apex_has_the_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert gradient_fusion(on_gpu=True) == {"gradient_accumulation_fusion": False}, "it is not installed here"
    (tmp_path / f"{APEX_KERNEL}.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    assert gradient_fusion(on_gpu=True) == {"gradient_accumulation_fusion": True}
    assert gradient_fusion(on_gpu=False) == {"gradient_accumulation_fusion": False}
