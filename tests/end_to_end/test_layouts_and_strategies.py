"""The same recipe on one rank and on two, and with each of the four horizon strategies."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from prune_opd.check.precision import has_wide_vectors
from prune_opd.config.overrides import apply_overrides
from prune_opd.config.recipe import load_recipe
from prune_opd.method.horizon import make_controller
from tests.end_to_end.runs import BARE, tiny_model, train

SETTINGS = ("steps=4", "rollout.prompts=16", "checkpoint.every=0", *BARE)
PIPELINE = ("parallel.tensor=1", "parallel.pipeline=2", "parallel.virtual_pipeline=2")


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Four steps on one rank."""
    tiny_model("student")
    return train(tmp_path_factory.mktemp("one") / "run", *SETTINGS, "--nproc", "1")


def test_two_tensor_parallel_ranks_train_like_one(one: list[dict[str, Any]], tmp_path: Path) -> None:
    two = train(tmp_path / "two", *SETTINGS, "--nproc", "2")
    assert len(one) == len(two) == 4
    assert all(step["response_length"] <= step["horizon"] for step in one) and one[0]["horizon"] == 64
    assert one[0]["rollout_digest"] == two[0]["rollout_digest"], "first-step rollouts must be the same tokens"
    for key in ("loss", "overlap", "event_rate", "grad_norm"):
        assert one[0][key] == pytest.approx(two[0][key], rel=1e-5), key
    # Later a rounding difference may flip a sampled token, and the runs part; they must still learn alike.
    assert [step["horizon"] for step in one] == [step["horizon"] for step in two]
    assert one[-1]["overlap"] == pytest.approx(two[-1]["overlap"], abs=0.03)


def test_a_pipeline_beside_a_tensor_parallel_teacher_trains_like_one_rank(
    one: list[dict[str, Any]], tmp_path: Path
) -> None:
    teacher = ("parallel.teacher_tensor=2", "parallel.teacher_pipeline=1")
    two = train(tmp_path / "two", *SETTINGS, *PIPELINE, *teacher, "stop_after=2", "--nproc", "2")
    assert len(two) == 2
    for ours, theirs in zip(two, one, strict=False):
        assert ours["rollout_digest"] == theirs["rollout_digest"], "weights from a pipeline sample the same tokens"
        for key in ("loss", "overlap", "event_rate", "grad_norm"):
            assert ours[key] == pytest.approx(theirs[key], rel=2e-5), key
        assert ours["horizon"] == theirs["horizon"]


def test_bf16_trains_and_saves_with_fp8_rollouts_and_a_dry_run_of_the_memory_phases(tmp_path: Path) -> None:
    settings = ("steps=2", "rollout.prompts=4", "precision.params=bf16", *BARE, "--nproc", "1")
    kv_cache = "fp8" if has_wide_vectors() else "auto"  # vLLM refuses it on other CPUs
    fp8 = ("rollout.quantization=fp8_per_channel", f"rollout.kv_cache_dtype={kv_cache}")
    memory = ("memory.sleep_level=2", "memory.offload_optimizer=true", "memory.offload_teacher=true")
    steps = train(tmp_path / "run", *settings, *fp8, *memory, "checkpoint.every=1")
    assert len(steps) == 2 and all(0.5 < step["overlap"] < 1 for step in steps)
    assert (tmp_path / "run" / "checkpoints" / "latest").read_text() == "step_000002"
    record = json.loads((tmp_path / "run" / "memory.json").read_text())
    assert record["dry_run"] is True
    entered = [(entry["phase"], entry["transitions"]) for entry in record["phases"]]
    assert entered == [
        ("build", ["away optimizer", "away teacher", "away teacher_head"]),
        ("sync", []),
        ("parity", []),
        ("rollout", []),
        ("teacher", ["sleep rollout_weights + kv_cache", "back teacher", "back teacher_head"]),
        ("train", ["away teacher", "back optimizer"]),
        ("checkpoint", ["away teacher_head"]),
        ("sync", ["away optimizer", "wake rollout_weights"]),
    ]


def test_full_rollouts_without_a_gate_are_plain_opd(tmp_path: Path) -> None:
    overrides = ("horizon.strategy=full", "gate=null")
    steps = train(tmp_path / "run", "steps=1", "rollout.prompts=4", *BARE, *overrides, "--nproc", "1")
    assert [step["horizon"] for step in steps] == [216]
    assert all(step["response_length"] <= step["horizon"] for step in steps)
    assert all(step["weight_mean"] == 1 and step["event_rate"] == 0 and 0 < step["overlap"] < 1 for step in steps)


@pytest.mark.parametrize(
    ("overrides", "horizons"),
    [
        (("horizon.strategy=topd", "horizon.rho=0.25"), [54, 54]),
        (("horizon.strategy=popd", "horizon.interval=1"), [64, 80]),
    ],
    ids=["topd", "popd"],
)
def test_a_strategy_is_one_override(overrides: tuple[str, ...], horizons: list[int]) -> None:
    """What a step does with its horizon is in the runs above; here is where the override takes it."""
    config: Any = apply_overrides(load_recipe("tiny_compatible"), list(overrides))
    controller = make_controller(config.horizon)
    first = controller.horizon
    controller.update([0.0] * 4, [first] * 4, [False] * 4)  # nothing reliable: these strategies do not look
    assert [first, controller.horizon] == horizons
