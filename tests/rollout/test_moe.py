"""Mixture of experts in the rollout engine: right after every reload, although the CPU path packs experts only once."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.distributed.ranks import run_ranks

WORKER = Path(__file__).with_name("worker_moe.py")


@pytest.mark.parametrize("width", [128, 96], ids=["experts as wide as the kernel wants", "experts that vLLM pads"])
def test_greedy_tokens_and_logprobs_are_those_of_transformers_after_every_reload(tmp_path: Path, width: int) -> None:
    run_ranks(WORKER, 2, [tmp_path, str(width)], timeout=180)
    loads = json.loads((tmp_path / "result.json").read_text())
    assert [load["weights"] for load in loads] == ["from disk", "b", "a", "b"]
    for load in loads:
        assert load["other tokens"] == 0, load
        assert load["largest difference"] <= 1e-3, load
    assert loads[1]["tokens"] == loads[3]["tokens"] != loads[2]["tokens"]
