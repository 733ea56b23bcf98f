"""A checkpoint of adapters is small, loads in any layout, and a run goes on from it bit by bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.distributed.ranks import run_ranks
from tests.distributed.tiny_run import write_pair
from tests.distributed.worker_lora_checkpoint import COPY, LAYOUTS
from tests.models import tensors_of

WORKER = Path(__file__).with_name("worker_lora_checkpoint.py")
LOADS = {"one": "TP2+SP", "PP2": "one", "TP2+dist-opt": "DP2+dist-opt"}  # whose checkpoint is loaded, too


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    models = tmp_path_factory.mktemp("models")
    write_pair(models, num_hidden_layers=4)
    out = {name: tmp_path_factory.mktemp(name.replace("+", "_")) for name in LAYOUTS}
    for name in LAYOUTS:
        more = [out[LOADS[name]] / COPY] if name in LOADS else []
        run_ranks(WORKER, 1 if name == "one" else 2, [models, out[name], name, *more], timeout=200)
    return out


def results(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "results.json").read_text())


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("kind", ["any layout: True", "any layout: False"])
def test_a_resumed_run_is_bit_identical_to_an_unbroken_one(folders: dict[str, Path], name: str, kind: str) -> None:
    if (found := results(folders[name]).get(kind)) is None:
        assert "dist-opt" not in name  # there is one format without it
        return
    assert found["loaded"] and found["moments"] and found["moved"] and found["ends"]
    unbroken, resumed = found["steps"]
    assert unbroken == resumed


@pytest.mark.parametrize("name", LOADS)
def test_adapters_cross_over_to_another_layout_unchanged(folders: dict[str, Path], name: str) -> None:
    there, here = load_file(folders[LOADS[name]] / "saved.safetensors"), load_file(folders[name] / "moved.safetensors")
    assert there.keys() == here.keys()
    assert [name for name in there if not torch.equal(there[name], here[name])] == []


@pytest.mark.parametrize("name", LOADS)
def test_training_goes_on_in_another_layout_as_in_the_old_one(folders: dict[str, Path], name: str) -> None:
    there, here = results(folders[LOADS[name]])["probe"], results(folders[name])["moved"]
    for what in ("loss", "grad_norm", "overlap", "weight_mean", "weight_norm"):
        assert here[what] == pytest.approx(there[what], rel=1e-5), what
    for what in ("lr", "tokens"):
        assert here[what] == there[what], what


def test_a_checkpoint_has_the_adapters_alone(folders: dict[str, Path]) -> None:
    found = results(folders["one"])
    adapters, whole = found["any layout: True"]["bytes"], found["whole bytes"]
    assert adapters < whole / 6  # 1/14 of the numbers; the frames of tiny tensors are half of these files


def test_weights_that_the_adapters_were_not_trained_on_are_refused(folders: dict[str, Path]) -> None:
    assert "has adapters alone, and the weights that they were trained on" in results(folders["one"])["another student"]


@pytest.mark.parametrize("what", ["", "adapter"])
def test_an_exported_checkpoint_is_what_the_run_exports(folders: dict[str, Path], what: str) -> None:
    ours, theirs = (tensors_of(folders["one"] / folder / what) for folder in ("exported", "hf"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
