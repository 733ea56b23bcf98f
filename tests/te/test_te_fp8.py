"""FP8 settings in Transformer Engine's modules: which of its recipes megatron-core makes of them. Kernels are stubs."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.ranks import REPOSITORY, run_ranks
from tests.models import write_model
from tests.te.test_te_spec import te_packages  # noqa: F401  # a fixture

WORKER = Path(__file__).with_name("worker_te_fp8.py")


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory, te_packages: Path) -> dict[str, Any]:  # noqa: F811
    folder = tmp_path_factory.mktemp("te_fp8")
    write_model(folder / "model", num_hidden_layers=4)
    path = os.pathsep.join([str(REPOSITORY), str(te_packages)])
    run_ranks(WORKER, 1, [folder / "model", folder], timeout=120, env={"PYTHONPATH": path}, kind="fresh")
    found: dict[str, Any] = json.loads((folder / "fp8.json").read_text())
    return found


def test_each_recipe_becomes_transformer_engines_own(results: dict[str, Any]) -> None:
    assert {name: found["recipe"] for name, found in results.items()} == {
        "delayed": "DelayedScaling",
        "tensorwise": "Float8CurrentScaling",
        "blockwise": "Float8BlockScaling",
    }
    assert [found["format"] for found in results.values()] == ["HYBRID", "E4M3", "E4M3"]


def test_delayed_scaling_looks_back_as_far_as_asked_and_takes_the_largest(results: dict[str, Any]) -> None:
    assert (results["delayed"]["history"], results["delayed"]["amax"]) == (7, "max")


def test_first_and_last_layers_stay_in_bf16(results: dict[str, Any]) -> None:
    assert {name: found["bf16 layers"] for name, found in results.items()} == {
        "delayed": [],
        "tensorwise": [0, 2, 3],
        "blockwise": [3],
    }


def test_no_module_keeps_fp8_copies_of_its_weights(results: dict[str, Any]) -> None:
    """They would stay on the device in every phase: the moves take parameters only."""
    for found in results.values():
        assert found["keeps FP8 copies"] and not any(found["keeps FP8 copies"])


def test_only_delayed_scaling_puts_its_history_into_a_checkpoint(results: dict[str, Any]) -> None:
    """It is a pickle, and the other recipes need none."""
    pickled = {name: found["pickled in a checkpoint"] for name, found in results.items()}
    assert pickled["delayed"] > 0 and pickled["tensorwise"] == pickled["blockwise"] == 0


def test_megatron_core_takes_the_fused_kernels(results: dict[str, Any]) -> None:
    assert all(found["fused"] == [True, True, False] for found in results.values())
