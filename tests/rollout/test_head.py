"""rollout.head_dtype=fp32 in a real bf16 engine: its logits keep their digits, also after new weights have come."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from prune_opd.config import RolloutConfig
from prune_opd.rollout.engine import rollout_arguments
from tests.rollout.one_rank import run_worker

WORKER = Path(__file__).with_name("worker_head.py")


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run_worker(WORKER, tmp_path_factory.mktemp("head"), "head.json")


def test_a_bf16_engine_computes_its_logits_in_fp32(results: dict[str, Any]) -> None:
    assert results["fp32"]["weight"] == results["rounded"]["weight"] == "torch.bfloat16"
    assert results["fp32"]["logits"] == "torch.float32" and results["rounded"]["logits"] == "torch.bfloat16"
    assert results["fp32"]["error"] < 1e-5 < 1e-3 < results["rounded"]["error"]


def test_generation_goes_through_that_head(results: dict[str, Any]) -> None:
    """Which of both is nearer to the trainer says little here: the layers before it are in bf16 in both."""
    assert results["fp32"]["difference"] != results["rounded"]["difference"]
    assert 0 < results["fp32"]["difference"] < 0.05 and 0 < results["rounded"]["difference"] < 0.05


def test_without_the_setting_vllm_is_told_nothing_of_the_head() -> None:
    assert "hf_overrides" not in rollout_arguments(RolloutConfig())
