"""The planner's bytes beside those of real megatron-core models, gradients, optimizers, teachers and activations."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.distributed.ranks import run_ranks
from tests.distributed.worker_plan_memory import CASES
from tests.models import write_model

WORKER = Path(__file__).with_name("worker_plan_memory.py")
# megatron-core fills the buffers that the distributed optimizer cuts up to whole blocks; only tiny models notice.
PADDED = 0.02


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, list[float]]]:
    models, out = tmp_path_factory.mktemp("models"), tmp_path_factory.mktemp("out")
    for family in ("qwen2", "qwen3_moe"):
        write_model(models / family, family, tied=False, num_hidden_layers=4)
    run_ranks(WORKER, 2, [models, out], timeout=280)
    return json.loads((out / "bytes.json").read_text())


@pytest.mark.parametrize("case", CASES)
def test_weights_are_planned_to_the_byte(found: dict[str, dict[str, list[float]]], case: str) -> None:
    for part in ("student", "teacher", "teacher_head"):
        real, planned = found[case][part]
        assert planned == real, part


@pytest.mark.parametrize("case", CASES)
def test_gradients_and_optimizer_are_planned_up_to_padding(found: dict[str, dict[str, list[float]]], case: str) -> None:
    for part in ("gradients", "optimizer"):
        real, planned = found[case][part]
        assert planned == pytest.approx(real, rel=PADDED if "dist-opt" in case else 1e-3), part


@pytest.mark.parametrize("case", [case for case in CASES if "PP2" not in case])
def test_activations_are_planned_as_autograd_saves_them(found: dict[str, dict[str, list[float]]], case: str) -> None:
    """By layout, experts and recompute; without the norms' inputs, which a GPU has from Transformer Engine."""
    real, planned = found[case]["activations"]
    assert planned == pytest.approx(real, rel=0.01)
