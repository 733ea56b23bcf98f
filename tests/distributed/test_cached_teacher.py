"""A teacher whose rows come from disk is the teacher in the job, bit for bit, whatever part of them is there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.distributed.ranks import read_ranks, run_ranks
from tests.distributed.tiny_run import LENGTHS, write_pair
from tests.distributed.worker_cached_teacher import HINTS

WORKER = Path(__file__).with_name("worker_cached_teacher.py")
CASES = [
    (1, "TP", "fp32"),
    (2, "DP", "fp32"),
    (2, "TP", "bf16"),
    (2, "DP, teacher TP 2", "fp32"),
    (2, "TP, teacher PP 2", "fp32"),
]
ROWS, HIDDEN = len(LENGTHS), 64

pytestmark = pytest.mark.ranks


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    write_pair(folder)
    return folder


@pytest.mark.parametrize(("ranks", "layout", "dtype"), CASES)
def test_steps_are_bit_identical(tmp_path: Path, models: Path, ranks: int, layout: str, dtype: str) -> None:
    run_ranks(WORKER, ranks, [models, tmp_path, layout, dtype], timeout=300)
    of_rank = read_ranks(tmp_path, ranks)
    for found in of_rank:
        for kind in ("first", "second", "only", "repaired", "after"):
            assert [step["step"] for step in found[kind]] == [step["step"] for step in found["plain"]], kind
    found = of_rank[0]
    size = sum(LENGTHS) * HIDDEN * (4 if dtype == "fp32" else 2)
    assert cached(found, "first") == [0, 0] and cached(found, "second") == cached(found, "only") == [ROWS, ROWS]
    assert [step["cache"]["cache_bytes_written"] for step in found["first"]] == [size, size]
    assert [step["cache"]["cache_bytes_read"] for step in found["second"]] == [size, size]
    assert [step["cache"]["cache_bytes_written"] for step in found["second"]] == [0, 0]
    assert not any(step["notes"] for kind in ("first", "second", "only") for step in found[kind])
    assert found["layers"] == 0 and found["files"] == 2 * ROWS
    missing_and_damaged(of_rank)
    hinted(of_rank)
    if dtype == "fp32":
        trouble(found)


def cached(found: dict[str, Any], kind: str) -> list[int]:
    return [step["cache"]["cache_rows"] for step in found[kind]]


def missing_and_damaged(of_rank: list[dict[str, Any]]) -> None:
    """Without layers they are refused on all ranks alike; with layers their micro-batch is computed again."""
    first, second = of_rank[0]["refused"]
    assert all(found["refused"] == [first, second] for found in of_rank)
    assert "teacher_cache.mode = only: 1 of 7 rows are not in teacher_cache.dir" in first and "row 3" in first
    assert "run once with teacher_cache.mode=use" in first
    assert "row 5" in second and "another checksum than its numbers" in second
    repaired = of_rank[0]["repaired"]
    assert all(0 < rows < ROWS for rows in cached(of_rank[0], "repaired"))
    assert repaired[0]["notes"] == [] and "another checksum" in repaired[1]["notes"][0]
    assert cached(of_rank[0], "after") == [ROWS, ROWS]


def hinted(of_rank: list[dict[str, Any]]) -> None:
    """A row is one of what the teacher reads: with other words before it it is another row."""
    for found in of_rank:
        plain = [step["step"] for step in found["hinted, plain"]]
        assert all([step["step"] for step in found[f"hinted, {kind}"]] == plain for kind in ("first", "second"))
        assert plain != [step["step"] for step in found["plain"]]
    # Whole micro-batches of rows without a hint are there already; every row with one is not.
    assert all(rows <= HINTS.count(0) for rows in cached(of_rank[0], "hinted, first"))
    assert cached(of_rank[0], "hinted, second") == [ROWS, ROWS]


def trouble(found: dict[str, Any]) -> None:
    """A folder that is too small, or a disk that fails, changes no number and is said."""
    for kind in ("no room", "no disk"):
        steps = [step["step"] for step in found[kind]]
        assert steps == [step["step"] for step in found["plain"]][: len(steps)], kind
    assert "max_gb = 1e-06 holds no whole step" in found["no room"][0]["notes"][0]
    assert any("cannot write to" in note for note in found["no disk"][1]["notes"])
