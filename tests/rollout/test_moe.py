"""Mixture of experts in the rollout engine: correct after every reload, though the CPU path packs experts only once."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from prune_opd.check.machine import compiler_problems
from prune_opd.config import RolloutConfig
from tests.distributed.ranks import run_ranks

NO_COMPILER = compiler_problems(RolloutConfig(enforce_eager=False), gpu=False)
WORKER = Path(__file__).with_name("worker_moe.py")


@pytest.mark.parametrize(
    ("width", "mode"),
    [
        pytest.param(128, "eager", id="experts as wide as the kernel wants"),
        pytest.param(96, "eager", id="experts that vLLM pads"),
        pytest.param(
            96, "compiled", id="compiled", marks=pytest.mark.skipif(bool(NO_COMPILER), reason=str(NO_COMPILER))
        ),
    ],
)
def test_greedy_tokens_and_logprobs_are_those_of_transformers_after_every_reload(
    tmp_path: Path, width: int, mode: str
) -> None:
    cache = {"VLLM_CACHE_ROOT": str(tmp_path / "vllm")}
    run_ranks(WORKER, 2, [tmp_path, str(width), mode], timeout=180, env=cache, kind=mode)
    loads = json.loads((tmp_path / "result.json").read_text())
    assert [load["weights"] for load in loads] == ["from disk", "b", "a", "b"]
    for load in loads:
        assert load["other tokens"] == 0, load
        assert load["largest difference"] <= 1e-3, load
    assert loads[1]["tokens"] == loads[3]["tokens"] != loads[2]["tokens"]
