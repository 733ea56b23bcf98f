"""Fused kernels are asked for where they are, and nowhere else: megatron-core refuses what it does not find."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from prune_opd import platform

platform.prepare()

from prune_opd.megatron.model import APEX_KERNEL, fusions, gradient_fusion  # noqa: E402
from tests.distributed.ranks import run_ranks  # noqa: E402
from tests.distributed.tiny_run import write_pair  # noqa: E402

WORKER = Path(__file__).with_name("worker_apex_kernel.py")
LINEARS = 4 * 2  # QKV, attention's output, the MLP's two, in each of two layers
MICROBATCHES = 1


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


@pytest.fixture(scope="module")
def steps(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("apex")
    for kind in ("tied", "own"):
        write_pair(folder / kind, tied=kind == "tied")
    run_ranks(WORKER, 1, [folder, folder])
    return dict(json.loads((folder / "results.json").read_text()))


@pytest.mark.parametrize("kind", ["tied", "own"])
@pytest.mark.parametrize(("params", "most"), [("fp32", 1e-6), ("bf16", 1e-2)])
def test_apexs_kernel_and_the_loss_share_the_fp32_buffer(
    steps: dict[str, Any], kind: str, params: str, most: float
) -> None:
    """The kernel is a stand-in on the CPU. It adds every layer's gradients to main_grad, where the loss has put the
    head's: nothing is lost and nothing counts twice. In bf16 the plain way rounds each product, the kernel does not."""
    found = steps[f"{kind} {params}"]
    assert found["calls"] == [0, LINEARS * MICROBATCHES]
    assert len(found["apart"]) > LINEARS and max(found["apart"].values()) < most, found["apart"]
