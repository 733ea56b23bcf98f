"""Resident memory by owner: unwritten pages are nobody's, a shared storage counts once, the rest is what is left."""

from __future__ import annotations

import io

import torch
from rich.console import Console

from benchmarks.common import resident
from benchmarks.peers.command import print_memory
from benchmarks.peers.memory import by_owner, present_bytes

MIB = 2**20


def test_only_pages_that_were_written_are_resident() -> None:
    cache = torch.empty(64 * MIB, dtype=torch.uint8)
    assert present_bytes([cache]) < MIB
    cache[: 16 * MIB] = 1
    assert 16 * MIB <= present_bytes([cache]) < 17 * MIB


def test_a_storage_of_several_tensors_counts_once_and_an_empty_one_not_at_all() -> None:
    whole = torch.ones(8 * MIB, dtype=torch.uint8)
    assert present_bytes([whole, whole[4 * MIB :]]) == present_bytes([whole])
    assert present_bytes([torch.empty(0)]) == 0


def test_owners_and_the_rest_are_all_that_is_resident() -> None:
    imports = resident()
    student, teacher = (torch.ones(size * MIB, dtype=torch.uint8) for size in (32, 48))
    found = by_owner(imports, {"student": [student], "teacher": [teacher]})
    assert found["memory_imports"] == imports
    assert 32 * MIB <= found["memory_student"] < 33 * MIB
    assert 48 * MIB <= found["memory_teacher"] < 49 * MIB
    assert abs(sum(found.values()) - resident()) < MIB


def test_the_table_has_an_owner_that_one_contender_has_not() -> None:
    rows = {"ours": {"imports": 100 * MIB, "kv_cache": 7 * MIB}, "trl": {"imports": 50 * MIB}}
    written = io.StringIO()
    console = Console(file=written, width=100)
    print_memory({name: {"owners_bytes": row, "peak_bytes": 120 * MIB} for name, row in rows.items()}, console)
    lines = [line.replace("│", " ").split() for line in written.getvalue().splitlines()]
    assert ["kv_cache", "7"] in lines and ["imports", "100", "50"] in lines
    assert ["more", "at", "the", "peak", "13", "70"] in lines
