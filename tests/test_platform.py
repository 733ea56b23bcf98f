"""The CPU instead of a GPU: the CUDA names that megatron-core uses work, and nothing else in the process changes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.models import SHAPE, write_model
from tests.worker_platform import CALLS

ROOT = Path(__file__).resolve().parent.parent
THETA = 5e4

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="on CUDA nothing is changed")


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """From a process of its own: in this one other tests may have prepared torch, or looked up its factories."""
    folder = tmp_path_factory.mktemp("platform")
    model = write_model(folder / "model", rope_parameters={"rope_theta": THETA})
    command = [sys.executable, "tests/worker_platform.py", model, folder / "results.json"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=90)
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "results.json").read_text())


def test_without_cuda_the_machine_is_a_cpu_with_gloo_and_is_prepared_once(results: dict[str, Any]) -> None:
    assert results["machine"] == ["cpu", "cpu", "gloo", True]
    assert results["once"]
    assert not results["wandb came along"], "megatron-core's inference imports it where it can"
    assert results["bf16 sums in parts"] is False, "cuBLAS may not add up the parts of a product in bf16"


def test_whatever_asks_for_cuda_lands_on_the_cpu(results: dict[str, Any]) -> None:
    from prune_opd.platform import FACTORIES

    assert set(CALLS) == set(FACTORIES)
    assert {name: set(devices) for name, devices in results["devices"].items() if set(devices) != {"cpu"}} == {}


def test_other_devices_are_left_alone(results: dict[str, Any]) -> None:
    assert results["other devices"] == {
        "in a meta context": "meta",
        "in it, by name": "cpu",
        "meta": "meta",
        "plain": "cpu",
    }


def test_a_tensor_type_equals_its_cuda_name_and_its_own_and_no_other(results: dict[str, Any]) -> None:
    types = results["types"]
    for name in ("Float", "BFloat16", "Half"):
        assert types[name] == [True, True, False, False], name
    assert types["cast"] == [True, True]


def test_a_transformers_model_loaded_afterwards_has_the_right_rotary_frequencies(results: dict[str, Any]) -> None:
    """transformers builds models under `torch.device("meta")`, which knows torch's factories by identity: with replaced
    ones the buffers were made there and then filled with whatever the memory held."""
    half = SHAPE["head_dim"] // 2
    assert results["rotary"]["inv_freq"] == pytest.approx([THETA ** (-i / half) for i in range(half)], rel=1e-6)
    assert not results["rotary"]["meta"]


def test_generator_states_survive_json_and_continue_every_stream(results: dict[str, Any]) -> None:
    assert results["generators"]["drawn again"]
    assert results["generators"]["state again"]


def test_untouched_rng_restores_the_generators_after_an_error_too(results: dict[str, Any]) -> None:
    assert results["generators"]["untouched"]
    assert results["generators"]["untouched after an error"]
