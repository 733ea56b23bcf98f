"""Losses and gradients that are not finite, a disk that is full, an index that is a program."""

from __future__ import annotations

import json
import os
import pickle
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from prune_opd import platform
from prune_opd.errors import UserError
from tests.distributed.ranks import run_ranks
from tests.distributed.tiny_run import write_pair

WORKER = Path(__file__).with_name("worker_trouble.py")
DISK = "10m"


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A small file system of its own: a tmpfs, which takes root."""
    folder = tmp_path_factory.mktemp("disk")
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK}", "none", str(folder)], capture_output=True)
    if mounted.returncode != 0:
        pytest.skip("a small tmpfs cannot be mounted here: that takes root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.fixture(scope="module")
def results(disk: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("trouble")
    write_pair(folder)
    run_ranks(WORKER, 2, [folder, folder, disk], timeout=90)
    return json.loads((folder / "results.json").read_text())


@pytest.mark.parametrize("what", ["loss", "gradient", "logits"])
def test_an_update_that_is_not_finite_on_one_rank_is_left_out_on_all(results: dict[str, Any], what: str) -> None:
    assert results["not finite"][what] == {"updates": 0, "same": True, "window": True}


def test_training_goes_on_after_a_skipped_update(results: dict[str, Any]) -> None:
    found = results["not finite"]
    assert (found["first"], found["in a row"], found["after"], found["reset"]) == (1, 3, 1, 0)
    assert found["moved"] and found["finite"]


def test_rank_and_batch_are_named(results: dict[str, Any]) -> None:
    loss, gradient, logits, *_ = results["not finite"]["notes"]
    assert loss.startswith("step 2: an update was skipped, the loss is not finite on rank 1 (batch rows ")
    assert gradient.startswith("step 3: an update was skipped, the gradient is not finite on rank 0 (batch rows ")
    assert logits.startswith("step 4: an update was skipped, the loss is not finite on rank 1 (batch rows ")
    rows = [line.partition("batch rows ")[2].partition(";")[0] for line in (loss, gradient)]
    assert rows[0] != rows[1], "the two ranks have different rows"


def test_too_many_in_a_row_end_the_run(results: dict[str, Any]) -> None:
    """Three skipped, one made, four skipped: only the last four are in a row."""
    found = results["not finite"]
    assert "That is 4 in a row, survival.max_skipped allows no more" in found["stopped"]
    assert "not finite on rank 1 (batch rows" in found["stopped"]
    assert len(found["notes"]) == 6


def test_responses_whose_logits_are_not_finite_are_not_counted_as_unreliable(results: dict[str, Any]) -> None:
    found = results["not finite"]
    judged, responses = found["judged, logits"]
    assert 0 < judged < responses, "those of the other rank were judged"
    assert found["judged, loss"] == [responses, responses]


def test_a_full_disk_is_named_on_every_rank_and_the_last_good_checkpoint_stays(results: dict[str, Any]) -> None:
    found = results["full disk"]
    assert all("the last good one, step_000001, is untouched" in said for said in found["said"])
    assert re.search(r"checkpoint of step 2 could not be written to .*; 0\.\d MiB were free\)", found["said"][0])
    assert found["names"] == ["latest", "step_000001"], "the half-written one gives its room back"
    assert found["good"] == "step_000001"


def test_saving_goes_on_when_there_is_room_again(results: dict[str, Any]) -> None:
    assert results["full disk"]["later"] == "step_000005"


def test_the_newest_checkpoints_and_those_of_each_nth_step_stay(results: dict[str, Any]) -> None:
    """keep = 2, keep_every = 2, saved after steps 1 to 5."""
    assert results["full disk"]["kept"] == ["latest", "step_000002", "step_000004", "step_000005"]


class Program:
    def __reduce__(self) -> Any:
        return os.system, ("true",)


def test_an_index_that_is_a_program_is_not_run(tmp_path: Path) -> None:
    platform.prepare()
    from prune_opd.megatron.checkpoint import refuse_programs

    index = tmp_path / ".metadata"
    index.write_bytes(pickle.dumps(Program()))
    with pytest.raises(UserError, match=r"\.metadata is not the index of a checkpoint \(it names posix\.system\)"):
        refuse_programs(index)
    by_way_of_an_index = b"\x80\x04\x8c\x27torch.distributed.checkpoint.filesystem\x8c\x09os.system\x93."
    index.write_bytes(by_way_of_an_index)
    with pytest.raises(UserError, match=r"it names torch\.distributed\.checkpoint\.filesystem\.os\.system"):
        refuse_programs(index)


@pytest.mark.parametrize(
    ("owner", "name", "accepted"),
    [
        ("torch.distributed.checkpoint.metadata\n_MEM_FORMAT_ENCODING", "TORCH_CONTIGUOUS_FORMAT", True),
        ("torch.distributed.checkpoint.metadata\n_MEM_FORMAT_ENCODING", "mro", False),
        ("torch.distributed.checkpoint.metadata\nTensorProperties", "__init__", False),
        ("os\nenviron", "copy", False),
    ],
)
def test_of_getattr_an_index_may_have_enum_members_only(tmp_path: Path, owner: str, name: str, accepted: bool) -> None:
    """Python 3.11.2 writes an enum's member as a call of getattr, later ones by its value."""
    from prune_opd.megatron.checkpoint import refuse_programs

    index = tmp_path / ".metadata"
    index.write_bytes(f"cbuiltins\ngetattr\n(c{owner}\nV{name}\ntR.".encode())
    if accepted:
        refuse_programs(index)
    else:
        with pytest.raises(UserError, match="is not the index of a checkpoint"):
            refuse_programs(index)
