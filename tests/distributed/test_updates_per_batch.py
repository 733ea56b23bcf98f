"""`optimizer.updates_per_batch`: the updates of a batch are the same in every layout, and one is what it always was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.distributed.ranks import read_ranks, run_ranks
from tests.distributed.tiny_run import LENGTHS, OPTIMIZER, write_pair
from tests.distributed.worker_updates import CASES

WORKER = Path(__file__).with_name("worker_updates.py")
LAYOUTS = {"tp1": (1, 1), "tp2": (2, 2), "dp2": (2, 1)}  # ranks, tensor parallel


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    models = tmp_path_factory.mktemp("models")
    write_pair(models)
    folders = {}
    for layout, (ranks, tensor_parallel) in LAYOUTS.items():
        folders[layout] = tmp_path_factory.mktemp(layout)
        run_ranks(WORKER, ranks, [models, folders[layout], str(tensor_parallel)], timeout=120)
    return folders


def records(outputs: dict[str, Path], layout: str, case: str) -> list[list[dict[str, Any]]]:
    return [rank[case] for rank in read_ranks(outputs[layout], LAYOUTS[layout][0])]


@pytest.mark.parametrize("layout", ["tp2", "dp2"])
@pytest.mark.parametrize("case", CASES)
def test_several_updates_are_the_same_in_every_layout(outputs: dict[str, Path], layout: str, case: str) -> None:
    (expected,) = records(outputs, "tp1", case)
    for record in records(outputs, layout, case):
        for got, wanted in zip(record, expected, strict=True):
            assert got["tokens"] == wanted["tokens"] == sum(LENGTHS)
            assert got.keys() == wanted.keys()
            for name in ("loss", "grad_norm", "divergence", "weight_mean", "ratio_mean", "clip_fraction", "lr"):
                assert name not in wanted or got[name] == pytest.approx(wanted[name], rel=1e-4), name
    parameters = load_file(outputs["tp1"] / f"{case}.rank0.safetensors")
    for rank in range(LAYOUTS[layout][0]):
        for name, tensor in load_file(outputs[layout] / f"{case}.rank{rank}.safetensors").items():
            assert (tensor - parameters[name]).abs().max() <= 2e-6, name


def test_the_ratio_is_one_until_the_first_update_and_then_it_moves(outputs: dict[str, Path]) -> None:
    (steps,) = records(outputs, "tp1", "topk_reverse_kl")
    for step in steps:  # the second step's policy is the student that the first has left
        assert step["by_update"][0] == 0
        assert all(moved > 1e-6 for moved in step["by_update"][1:])
        assert 0 <= step["clip_fraction"] < 1 and step["ratio_mean"] != 1
    (steps,) = records(outputs, "tp1", "full_vocab_jsd")
    assert "ratio_mean" not in steps[0]  # a divergence has no ratio


def test_the_learning_rate_counts_steps_and_not_updates(outputs: dict[str, Path]) -> None:
    (steps,) = records(outputs, "tp1", "topk_reverse_kl")
    assert [step["lr"] for step in steps] == pytest.approx([OPTIMIZER.lr * (1 - s / 8) for s in (1, 2)])


def test_one_update_is_bit_for_bit_the_step_that_knows_nothing_of_updates(outputs: dict[str, Path]) -> None:
    for layout in LAYOUTS:
        for (one,), (plain,) in zip(records(outputs, layout, "one"), records(outputs, layout, "plain"), strict=True):
            assert all(one[name] == plain[name] for name in ("loss", "grad_norm", "divergence", "overlap", "lr"))
        one, plain = (load_file(outputs[layout] / f"{case}.rank0.safetensors") for case in ("one", "plain"))
        assert all(torch.equal(one[name], plain[name]) for name in plain)
