"""Rows on disk: what their names depend on, that nothing else is ever taken for one, and how much room they take."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from prune_opd.elsewhere.row_store import PARTIAL, DamagedRowError, RowStore, Shape, files, row_key

TEACHER, OTHER = "0" * 32, "1" * 32
ROW = torch.randn(5, 8, generator=torch.Generator().manual_seed(1))
EXPECTED = {"hidden_TH": Shape(torch.float32, (5, 8))}
KEY = row_key((1, 2, 3), (4, 5, 6, 7, 8))


def store(folder: Path, teacher: str = TEACHER, max_bytes: int = 10**6) -> RowStore:
    return RowStore(folder, teacher, max_bytes)


def put(folder: Path) -> Path:
    at = store(folder)
    at.write(KEY, {"hidden_TH": ROW})
    return at.path(KEY)


def refused(folder: Path, problem: str, **changes: Any) -> None:
    with pytest.raises(DamagedRowError, match=problem):
        store(folder, **changes).read(KEY, EXPECTED)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_comes_back_bit_for_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    row = ROW.to(dtype)
    at = store(tmp_path)
    assert at.read(KEY, {"hidden_TH": Shape(dtype, (5, 8))}) is None
    at.write(KEY, {"hidden_TH": row, "extra_T": torch.arange(5)})
    expected = {"hidden_TH": Shape(dtype, (5, 8)), "extra_T": Shape(torch.int64, (5,))}
    found = store(tmp_path).read(KEY, expected)
    assert found is not None and torch.equal(found["hidden_TH"], row) and found["extra_T"].tolist() == [0, 1, 2, 3, 4]


def test_a_row_that_is_a_view_of_a_larger_tensor_is_kept_by_itself(tmp_path: Path) -> None:
    whole = torch.randn(20, 8)
    store(tmp_path).write(KEY, {"hidden_TH": whole[3:8]})
    found = store(tmp_path).read(KEY, EXPECTED)
    assert found is not None and torch.equal(found["hidden_TH"], whole[3:8])


def test_the_name_depends_on_every_id_and_on_where_the_response_begins() -> None:
    keys = {
        row_key(prompt, response)
        for prompt, response in [
            ((1, 2, 3), (4, 5)),
            ((1, 2), (3, 4, 5)),
            ((1, 2, 3, 4), (5,)),
            ((1, 2, 3), (4, 6)),
            ((1, 2, 3), (4,)),
            ((0, 2, 3), (4, 5)),
            ((), (1, 2, 3, 4, 5)),
        ]
    }
    assert len(keys) == 7 and all(re.fullmatch("[0-9a-f]{32}", key) for key in keys)


def test_another_teachers_row_is_not_there(tmp_path: Path) -> None:
    put(tmp_path)
    assert store(tmp_path, OTHER).read(KEY, EXPECTED) is None


def test_a_file_that_was_cut_off_is_refused(tmp_path: Path) -> None:
    path = put(tmp_path)
    whole = path.read_bytes()
    for length in (0, 4, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        refused(tmp_path, "cannot be read")


def test_no_flipped_bit_is_taken_for_a_number(tmp_path: Path) -> None:
    """In every third byte of the file, header and checksum included."""
    path = put(tmp_path)
    whole = path.read_bytes()
    for place in range(0, len(whole), 3):
        changed = bytearray(whole)
        changed[place] ^= 1
        path.write_bytes(changed)
        try:
            found = store(tmp_path).read(KEY, EXPECTED)
        except DamagedRowError:
            continue
        # What is left are places without a meaning, like the blanks that fill up the header.
        assert found is not None and torch.equal(found["hidden_TH"], ROW)


def test_a_file_under_another_name_is_refused(tmp_path: Path) -> None:
    path, other = put(tmp_path), row_key((1,), (2,))
    renamed = store(tmp_path).path(other)
    renamed.parent.mkdir(parents=True, exist_ok=True)
    path.replace(renamed)
    with pytest.raises(DamagedRowError, match="says row = "):
        store(tmp_path).read(other, EXPECTED)


def test_a_file_in_another_teachers_folder_is_refused(tmp_path: Path) -> None:
    path = put(tmp_path)
    moved = store(tmp_path, OTHER).path(KEY)
    moved.parent.mkdir(parents=True)
    path.replace(moved)
    refused(tmp_path, "says teacher = ", teacher=OTHER)


@pytest.mark.parametrize("shape", [Shape(torch.float32, (4, 8)), Shape(torch.bfloat16, (5, 8))])
def test_a_row_of_another_shape_or_dtype_is_refused(tmp_path: Path, shape: Shape) -> None:
    put(tmp_path)
    with pytest.raises(DamagedRowError, match="holds hidden_TH float32"):
        store(tmp_path).read(KEY, {"hidden_TH": shape})


def test_a_directory_in_its_place_is_refused(tmp_path: Path) -> None:
    store(tmp_path).path(KEY).mkdir(parents=True)
    refused(tmp_path, "cannot be read")


def test_a_write_that_fails_leaves_nothing_under_the_name(tmp_path: Path) -> None:
    at = store(tmp_path)
    with mock.patch.object(Path, "replace", side_effect=OSError("no space")), pytest.raises(OSError, match="no space"):
        at.write(KEY, {"hidden_TH": ROW})
    assert at.read(KEY, EXPECTED) is None and not list(tmp_path.rglob(f"*{PARTIAL}"))


def test_a_process_killed_while_it_writes_leaves_no_row(tmp_path: Path) -> None:
    """For real: SIGKILL between the bytes and the name."""
    script = f"""
import os, pathlib, signal, torch
from prune_opd.elsewhere.row_store import RowStore
pathlib.Path.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
RowStore(pathlib.Path({str(tmp_path)!r}), {TEACHER!r}, 10**6).write({KEY!r}, {{"hidden_TH": torch.ones(5, 8)}})
"""
    assert subprocess.run([sys.executable, "-c", script], timeout=60, check=False).returncode == -9
    assert store(tmp_path).read(KEY, EXPECTED) is None and files(tmp_path) == []
    (left,) = tmp_path.rglob(f"*{PARTIAL}")
    files(tmp_path)
    assert left.exists()  # it may be another run's, which is still writing
    os.utime(left, (0, 0))
    files(tmp_path)
    assert not left.exists()


def test_the_oldest_rows_go_and_the_bound_holds(tmp_path: Path) -> None:
    at = store(tmp_path, max_bytes=10**9)
    size = at.write(row_key((0,), (0,)), {"hidden_TH": ROW})
    for i in range(1, 10):
        at.write(row_key((i,), (i,)), {"hidden_TH": ROW})
    for i in range(10):
        os.utime(at.path(row_key((i,), (i,))), (1000 + i, 1000 + i))
    assert at.read(row_key((0,), (0,)), EXPECTED) is not None  # it is the newest now
    small = store(tmp_path, OTHER, max_bytes=8 * size)  # of another teacher: the bound is the folder's
    assert small.make_room(size)
    small.write(row_key((99,), (99,)), {"hidden_TH": ROW})
    assert sum(row.size for row in files(tmp_path)) <= 8 * size
    there = [at.read(row_key((i,), (i,)), EXPECTED) is not None for i in range(10)]
    assert there[0] and not any(there[1:4]) and all(there[6:])


def test_the_bound_holds_over_many_steps_of_two_runs(tmp_path: Path) -> None:
    runs = [store(tmp_path, max_bytes=40_000) for _ in range(2)]
    for step in range(100):
        at = runs[step % 2]
        assert at.make_room(1024)
        at.write(row_key((step,), (step,)), {"hidden_TH": ROW})
        # Each run counts the folder again after a twentieth of it, so both together may be that far above.
        assert sum(row.size for row in files(tmp_path)) <= 40_000 * 1.05
    assert runs[0].read(row_key((99,), (99,)), EXPECTED) is not None


def test_more_than_the_bound_does_not_fit(tmp_path: Path) -> None:
    put(tmp_path)
    assert not store(tmp_path, max_bytes=100).make_room(101)
    assert len(files(tmp_path)) == 1


def test_files_of_others_are_never_thrown_out(tmp_path: Path) -> None:
    put(tmp_path)
    others = [
        tmp_path / "model.safetensors",
        tmp_path / "model" / "00" / f"{KEY}.safetensors",
        tmp_path / TEACHER / "x",
    ]
    for path in others:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"1" * 1000)
    at = store(tmp_path, max_bytes=1000)
    assert at.make_room(900)
    assert files(tmp_path) == [] and all(path.exists() for path in others)


def test_reading_does_not_wait_for_a_row_that_another_run_throws_out(tmp_path: Path) -> None:
    path = put(tmp_path)
    with mock.patch("os.utime", side_effect=lambda *_: path.unlink() or (_ for _ in ()).throw(FileNotFoundError())):
        found = store(tmp_path).read(KEY, EXPECTED)
    assert found is not None and torch.equal(found["hidden_TH"], ROW)


def test_two_processes_that_write_the_same_rows_leave_good_ones(tmp_path: Path) -> None:
    script = f"""
import pathlib, sys, torch
from prune_opd.elsewhere.row_store import RowStore, row_key
at = RowStore(pathlib.Path({str(tmp_path)!r}), {TEACHER!r}, 10**9)
for turn in range(10):
    for i in range(10):
        at.write(row_key((i,), (i,)), {{"hidden_TH": torch.full((50, 80), float(i))}})
"""
    both = [subprocess.Popen([sys.executable, "-c", script]) for _ in range(2)]
    at, shape, until = store(tmp_path), {"hidden_TH": Shape(torch.float32, (50, 80))}, time.monotonic() + 100
    while any(process.poll() is None for process in both) and time.monotonic() < until:
        for i in range(10):
            found = at.read(row_key((i,), (i,)), shape)  # never damaged
            assert found is None or torch.equal(found["hidden_TH"], torch.full((50, 80), float(i)))
    assert [process.wait(60) for process in both] == [0, 0] and len(files(tmp_path)) == 10
