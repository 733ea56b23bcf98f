"""The settings of check/precision.py in the real config objects, and the FP8 rollouts that a CPU can run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.rollout.one_rank import run_worker

WORKER = Path(__file__).with_name("worker_formats.py")


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run_worker(WORKER, tmp_path_factory.mktemp("formats"), "formats.json")


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("off", {"fp8": None, "fp8_param": False, "first_last_layers_bf16": False}),
        ("delayed", {"fp8": "hybrid", "fp8_recipe": "delayed", "fp8_amax_history_len": 7, "fp8_param": False}),
        (
            "tensorwise",
            {
                "fp8": "e4m3",
                "fp8_recipe": "tensorwise",
                "first_last_layers_bf16": True,
                "num_layers_at_start_in_bf16": 1,
                "num_layers_at_end_in_bf16": 2,
            },
        ),
        (
            "blockwise",
            {
                "fp8_recipe": "blockwise",
                "fp8_param": True,
                "first_last_layers_bf16": True,
                "num_layers_at_start_in_bf16": 0,
                "num_layers_at_end_in_bf16": 1,
            },
        ),
    ],
)
def test_fp8_settings_arrive_in_megatrons_own_config(
    results: dict[str, Any], name: str, settings: dict[str, Any]
) -> None:
    arrived = results["megatron"][name]
    assert {key: arrived["transformer"][key] for key in settings} == settings
    assert arrived["params_dtype"] == "torch.bfloat16"
    assert arrived["transformer"]["fp8_amax_compute_algo"] == ("most_recent" if name == "off" else "max")
    assert arrived["optimizer"] == (None if name == "off" else name)
    assert arrived["ddp"] == (name == "blockwise")  # the one with FP8 parameters


def test_rollout_settings_arrive_in_vllms_own_config_and_it_knows_every_name(results: dict[str, Any]) -> None:
    assert results["vllm"]["arrived"] == {
        "None, auto": [None, "auto", False],
        "fp8, fp8_e5m2": ["fp8", "fp8_e5m2", True],
        "fp8_per_block, fp8": ["fp8_per_block", "fp8", True],
    }
    assert results["vllm"]["unknown"] == []


def test_layers_that_would_ignore_fp8_are_not_built(results: dict[str, Any]) -> None:
    assert "FP8 is asked for and the layers are not Transformer Engine's" in results["local layers"]


def test_fp8_rollouts_follow_the_trainer_through_reloads(results: dict[str, Any]) -> None:
    assert results["weights"] == ["torch.float8_e4m3fn"]
    assert results["sleep on the CPU"] == 0  # asked for level 2: a dry run
    assert results["tokens after a reload"] == results["tokens"] != results["tokens of other weights"]
    for difference in (results["difference"], results["difference after a reload"]):
        assert 0 < difference < 0.1 * results["difference of other weights"]
