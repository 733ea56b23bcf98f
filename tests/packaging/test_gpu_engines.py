"""The steps of `make gpu-check` that have engines of vLLM: the rest is in test_gpu_check.py."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from scripts.gpu import reload
from scripts.gpu.rows import SMALL
from scripts.gpu_check import run
from tests.distributed.ranks import run_ranks


def test_engines_are_compared_after_reloads_of_experts_and_of_fp8(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With vLLM, in a small size: three syncs and a fresh engine each; what wants a GPU says so.

    Three of the four processes are forks of one that has vLLM; the first fresh engine has a new one, as on a GPU.
    """
    plain, anew = reload._process, []

    def process(kind: str, folder: Path) -> dict[str, Any]:
        if kind == "fresh" and not anew:
            anew.append(folder)
            return plain(kind, folder)
        run_ranks("-m", 1, ["scripts.gpu.engine_worker", kind, folder], timeout=reload.SECONDS, kind="compiled")
        found: dict[str, Any] = json.loads((folder / f"{kind}.json").read_text(encoding="utf-8"))
        return found

    monkeypatch.setattr(reload, "_process", process)
    rows = run(tmp_path, SMALL, {"experts": reload.experts_step, "reload": reload.reload_step})
    found = {(row.step, row.what): row for row in rows}
    for step, engine_ in (("experts", "fp32"), ("reload", "fp8_per_channel")):
        assert found[step, f"{engine_}: |Δ| from the trainer, 3 syncs"].passed
        beside = found[step, f"{engine_}: beside a fresh engine of the exported weights"]
        assert beside.passed and beside.figure.startswith("16 of 16 responses alike")
    assert "69 tensors" in found["experts", "fp32: sync"].figure  # 2 layers × (9 + 8 experts × 3), 2 heads, a norm
    for step, engine_ in (("experts", "fp8_per_tensor"), ("reload", "fp8_per_block")):
        assert found[step, engine_].passed is None and "needs a CUDA GPU" in found[step, engine_].figure
    assert not [row for row in rows if row.passed is False]
