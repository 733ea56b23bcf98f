"""A checkpoint of any layout goes on in any other, with either optimizer, as the run that saved it would have."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tests.distributed.ranks import run_ranks
from tests.distributed.test_layout_matrix import write_models
from tests.distributed.worker_checkpoint_layouts import BEFORE, OPTIMIZERS, OTHERS

WORKER = Path(__file__).with_name("worker_checkpoint_layouts.py")
CASES = [(optimizer, layout) for optimizer in OPTIMIZERS for layout in (*OTHERS, "alone")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("out")
    write_models(out / "models")
    for ranks in (2, 1):
        run_ranks(WORKER, ranks, [out / "models", out], timeout=200)
    return out


@pytest.fixture(scope="module")
def results(folder: Path) -> dict[str, dict[str, Any]]:
    two, one = (json.loads((folder / f"{ranks}.json").read_text()) for ranks in (2, 1))
    return {optimizer: two[optimizer] | one[optimizer] for optimizer in OPTIMIZERS}


@pytest.mark.parametrize(("optimizer", "layout"), CASES)
def test_training_goes_on_in_another_layout_as_it_would_have_in_the_old_one(
    results: dict[str, dict[str, Any]], optimizer: str, layout: str
) -> None:
    got, unbroken = results[optimizer][layout], results[optimizer]["unbroken"]
    assert got["first"] == unbroken["first"] == BEFORE
    for ours, theirs in zip(got["steps"], unbroken["steps"], strict=True):
        for name in ("loss", "grad_norm", "overlap", "weight_mean"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-5), name
        for name in ("lr", "horizon", "tokens", "event_rate", "reliable_length_B"):
            assert ours[name] == theirs[name], name
    assert got["parameters"] <= 1e-6  # what Adam's moments and their step count made of the gradients


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_steps_after_the_checkpoint_moved_the_parameters(folder: Path, optimizer: str) -> None:
    after = load_file(folder / optimizer / "hf" / "model.safetensors")
    before = load_file(folder / optimizer / "exported" / "model.safetensors")
    assert all((after[name] - before[name]).abs().max() > 1e-4 for name in after)


def test_both_optimizers_export_the_same_student(folder: Path) -> None:
    adam, distributed = (load_file(folder / name / "exported" / "model.safetensors") for name in OPTIMIZERS)
    assert adam.keys() == distributed.keys()
    assert all((adam[name] - distributed[name]).abs().max() <= 1e-6 for name in adam)
