"""Checksums of the stream see every bit, however a tensor lies in memory."""

from __future__ import annotations

import pytest
import torch

from prune_opd.weights.checksum import PIECE, bits_sum, copy_and_sum


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("columns", [8, 7, 1])
def test_a_strided_view_has_the_sum_of_its_contiguous_copy(dtype: torch.dtype, columns: int) -> None:
    whole = torch.randn(6, 40, generator=torch.Generator().manual_seed(0)).to(dtype)
    for start in (0, 8, 3):
        part = whole[:, start : start + columns]
        assert bits_sum(part) == bits_sum(part.clone(memory_format=torch.contiguous_format))
        assert bits_sum(part) != bits_sum(part + 1)


def test_the_last_bit_of_one_number_changes_the_sum() -> None:
    tensor = torch.ones(100, 64)
    other = tensor.clone()
    other.view(torch.int32)[99, 63] ^= 1
    assert bits_sum(tensor) != bits_sum(other)


def test_an_empty_part_of_a_tensor_sums_to_nothing() -> None:
    assert bits_sum(torch.ones(4, 8)[4:]) == 0


@pytest.mark.parametrize("rows", [0, 1, 7, 3 * PIECE // 160])  # of 160 bytes: the last are several pieces
def test_copying_in_pieces_copies_all_and_sums_what_was_read(rows: int) -> None:
    source = torch.randn(rows, 40, generator=torch.Generator().manual_seed(0))
    place = torch.zeros(rows, 90)[:, 10:50]  # strided, as the columns of a whole matrix are
    assert copy_and_sum(place, source) == bits_sum(source)
    assert torch.equal(place, source)
