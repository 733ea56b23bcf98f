"""One step of gated distillation is the same step whatever the layout and the size of the micro-batches."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tests.distributed.ranks import read_ranks, run_ranks
from tests.distributed.tiny_run import LENGTHS, write_pair
from tests.distributed.worker_trainer_layouts import BUDGETS, LR, MIN_LR, STEPS, WARMUP

WORKER = Path(__file__).with_name("worker_trainer_layouts.py")
LAYOUTS = {"tp1": (1, 1), "tp2": (2, 2), "dp2": (2, 1)}  # ranks, tensor parallel
WHOLE, *SMALLER = map(str, BUDGETS)
VARIANTS = [(layout, budget) for layout in LAYOUTS for budget in (WHOLE, *SMALLER)][1:]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    write_pair(folder)
    return folder


@pytest.fixture(scope="module")
def outputs(models: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Of each layout: rank<r>.json and the parameters."""
    folders = {}
    for layout, (ranks, tensor_parallel) in LAYOUTS.items():
        folders[layout] = tmp_path_factory.mktemp(layout)
        run_ranks(WORKER, ranks, [models, folders[layout], str(tensor_parallel)], timeout=120)
    return folders


def records(outputs: dict[str, Path], layout: str, budget: str) -> list[dict[str, Any]]:
    return [rank[budget] for rank in read_ranks(outputs[layout], LAYOUTS[layout][0])]


@pytest.mark.parametrize(("layout", "budget"), VARIANTS)
def test_loss_gradient_norm_and_statistics_equal_those_of_one_rank_and_one_batch(
    outputs: dict[str, Path], layout: str, budget: str
) -> None:
    (expected,) = records(outputs, "tp1", WHOLE)
    assert expected["microbatches"] == 1 and expected["tokens"] == sum(LENGTHS)
    for record in records(outputs, layout, budget):
        assert (record.pop("microbatches") > 1) == (budget != WHOLE)
        for name in ("loss", "grad_norm", "overlap", "weight_mean", "overlap_by_position", "weight_by_position"):
            assert record[name] == pytest.approx(expected[name], rel=1e-5), name
        for name in ("event_rate", "reliable_length", "reliable_length_B", "tokens", "horizon"):
            assert record[name] == expected[name], name


def test_of_two_ranks_with_a_row_a_micro_batch_one_has_an_empty_one(outputs: dict[str, Path]) -> None:
    assert len(LENGTHS) == 7
    assert [record["microbatches"] for record in records(outputs, "dp2", "1")] == [4, 4]


def test_the_gate_really_decides_something_in_this_comparison(outputs: dict[str, Path]) -> None:
    (record,) = records(outputs, "tp1", WHOLE)
    assert 0.1 < record["event_rate"] < 0.9
    assert 0.5 < record["weight_mean"] < 1.4
    reliable = record["reliable_length_B"]
    assert any(e < n for e, n in zip(reliable, LENGTHS, strict=True)) and any(e > 0 for e in reliable)


@pytest.mark.parametrize(("layout", "budget"), VARIANTS)
def test_the_parameters_after_the_step_are_the_same(
    models: Path, outputs: dict[str, Path], layout: str, budget: str
) -> None:
    before = load_file(models / "student" / "model.safetensors")
    expected = load_file(outputs["tp1"] / f"{WHOLE}.rank0.safetensors")
    for rank in range(LAYOUTS[layout][0]):
        got = load_file(outputs[layout] / f"{budget}.rank{rank}.safetensors")
        assert got.keys() == expected.keys() == before.keys()
        for name, tensor in expected.items():
            assert (tensor - before[name]).abs().max() > 1e-5, f"{name} did not move"
            assert (got[name] - tensor).abs().max() <= 1e-6, name


# ---------------------------------------------------------------------------------------------------- learning rate


def documented(schedule: str, warmup: int, update: int) -> float:
    """The rate of a 1-based update: up to lr at update `warmup`, down to min_lr at the last."""
    if update <= warmup:
        return LR * update / warmup
    done = (update - warmup) / (STEPS - warmup)
    share = {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}[schedule]
    return LR if schedule == "constant" else MIN_LR + share * (LR - MIN_LR)


@pytest.mark.parametrize("warmup", [0, WARMUP])
@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_the_learning_rate_of_every_update_is_the_documented_one(
    outputs: dict[str, Path], schedule: str, warmup: int
) -> None:
    (schedules,) = records(outputs, "tp1", "schedules")
    rates = schedules[f"{schedule} {warmup}"]["lr"]
    assert rates == pytest.approx([documented(schedule, warmup, s + 1) for s in range(STEPS)], rel=1e-9)
    assert rates[-1] == pytest.approx(LR if schedule == "constant" else MIN_LR)
    if warmup:
        assert rates[warmup - 1] == pytest.approx(LR)


@pytest.mark.parametrize("warmup", [0, WARMUP])
def test_the_first_update_moves_the_parameters_by_its_learning_rate(outputs: dict[str, Path], warmup: int) -> None:
    """Adam's first step is lr · g/|g|: the rate that is reported is the rate that was used."""
    (schedules,) = records(outputs, "tp1", "schedules")
    first = schedules[f"linear {warmup}"]
    assert first["first_move"] == pytest.approx(first["lr"][0], rel=1e-3)
