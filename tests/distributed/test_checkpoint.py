"""Checkpoints: nothing is lost, whatever layout loads them, and a save that breaks off leaves the last good one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from prune_opd import platform
from prune_opd.errors import UserError
from tests.distributed.ranks import run_ranks
from tests.distributed.tiny_run import write_pair
from tests.distributed.worker_checkpoint import AFTER, BEFORE, COPY, KEEP

WORKER = Path(__file__).with_name("worker_checkpoint.py")
LAUNCHES = {"tp1": (1, None), "tp2": (2, "tp1"), "tp1 again": (1, "tp2")}  # ranks, whose checkpoint is loaded, too
SAVED = f"step_{BEFORE:06d}"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    models = tmp_path_factory.mktemp("models")
    # A vocabulary of 300 has 384 padded rows at TP = 1 and 512 at TP = 2: another shape of embedding and head.
    write_pair(models, vocab_size=300, tied=False)
    out: dict[str, Path] = {}
    for name, (ranks, other) in LAUNCHES.items():
        out[name] = tmp_path_factory.mktemp(name.replace(" ", "_"))
        more = [out[other] / COPY] if other else []
        run_ranks(WORKER, ranks, [models, out[name], str(ranks), *more], timeout=120)
    return out


def results(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "results.json").read_text())


def state(folder: Path, name: str) -> dict[str, Tensor]:
    return load_file(folder / f"{name}.safetensors")


def assert_equal(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


# ---------------------------------------------------------------------------------------------------- resharding


@pytest.mark.parametrize(("loaded", "saved"), [("tp2", "tp1"), ("tp1 again", "tp2")])
def test_parameters_and_adam_moments_cross_over_to_another_layout_unchanged(
    folders: dict[str, Path], loaded: str, saved: str
) -> None:
    there, here = state(folders[saved], "saved"), state(folders[loaded], "moved")
    assert_equal(here, there)
    assert there["step"] == BEFORE
    for moment in ("exp_avg", "exp_avg_sq"):
        assert all(there[name].any() for name in there if name.startswith(moment))


@pytest.mark.parametrize(("loaded", "saved"), [("tp2", "tp1"), ("tp1 again", "tp2")])
def test_training_goes_on_in_another_layout_as_it_would_have_in_the_old_one(
    folders: dict[str, Path], loaded: str, saved: str
) -> None:
    there, here = results(folders[saved])["probe"], results(folders[loaded])["moved"]
    for name in ("loss", "grad_norm", "overlap", "weight_mean"):
        assert here[name] == pytest.approx(there[name], rel=1e-5), name
    for name in ("lr", "horizon", "tokens", "event_rate", "reliable_length_B"):
        assert here[name] == there[name], name


# ---------------------------------------------------------------------------------------------------- resuming


@pytest.mark.parametrize("layout", ["tp1", "tp2"])
def test_a_resumed_run_is_bit_identical_to_an_unbroken_one(folders: dict[str, Path], layout: str) -> None:
    got = results(folders[layout])
    assert got["loaded"] == [BEFORE, 12.5]
    assert len(got["unbroken"]) == 1 + AFTER  # first, the next number of each generator
    assert got["resumed"] == got["unbroken"]
    assert_equal(state(folders[layout], "resumed"), state(folders[layout], "unbroken"))


@pytest.mark.parametrize("layout", ["tp1", "tp2"])
def test_loading_into_fresh_objects_restores_every_parameter_and_moment(folders: dict[str, Path], layout: str) -> None:
    assert_equal(state(folders[layout], "loaded"), state(folders[layout], "saved"))
    different = state(folders[layout], "unbroken")
    assert all(not torch.equal(different[name], tensor) for name, tensor in state(folders[layout], "saved").items())


def test_the_controller_and_the_schedule_moved_in_this_comparison(folders: dict[str, Path]) -> None:
    steps = results(folders["tp1"])["unbroken"][1:]
    assert len({step["horizon"] for step in steps}) > 1
    assert len({step["lr"] for step in steps}) > 1


# ---------------------------------------------------------------------------------------------------- on disk


@pytest.mark.parametrize("layout", ["tp1", "tp2"])
def test_a_leftover_of_a_killed_save_does_not_get_in_the_way(folders: dict[str, Path], layout: str) -> None:
    got = results(folders[layout])
    assert got["latest of a fresh run"] == "None"
    assert got["saved"] == [SAVED, ["latest", SAVED]]


@pytest.mark.parametrize("layout", ["tp1", "tp2"])
def test_a_save_is_not_there_before_it_is_finished(folders: dict[str, Path], layout: str) -> None:
    assert results(folders[layout])["while it is written"] == ["None", True]


@pytest.mark.parametrize("layout", ["tp1", "tp2"])
def test_only_the_newest_checkpoints_are_kept_and_latest_names_the_last(folders: dict[str, Path], layout: str) -> None:
    got = results(folders[layout])
    assert got["kept"] == ["latest", "step_000004", "step_000006"]
    assert len(got["kept"]) == 1 + KEEP
    assert got["latest"] == "step_000006"


def test_a_save_that_breaks_off_leaves_latest_at_the_last_good_checkpoint(folders: dict[str, Path]) -> None:
    """Broken off before the state is written, and after it is complete but before the pointer has moved."""
    failed = results(folders["tp1"])["failed"]
    for raised, reason in zip(failed["raised"], ("No space left on device", "Is a directory"), strict=True):
        assert reason in raised and "the last good one, step_000006, is untouched" in raised
    assert failed["leftover"] == 0 and failed["complete"]
    assert failed["latest stayed"]


def test_a_save_never_drops_itself_in_favour_of_later_steps_that_were_given_up(folders: dict[str, Path]) -> None:
    failed = results(folders["tp1"])["failed"]
    assert failed["latest"] == "step_000090" and failed["latest is there"]
    assert failed["names"] == ["latest", "step_000090", "step_000091"]


@pytest.mark.parametrize("what", ["a missing folder", "an empty folder", "a run directory"])
def test_what_is_no_checkpoint_is_refused_by_name(tmp_path: Path, what: str) -> None:
    platform.prepare()
    from prune_opd.megatron.checkpoint import read_state

    path = tmp_path / "run"
    if what != "a missing folder":
        path.mkdir()
    if what == "a run directory":
        (path / "config.yaml").write_text("name: tiny\n")
    with pytest.raises(UserError, match=r"run is not a checkpoint .*: give a step_N folder of a run's checkpoints/"):
        read_state(path)
