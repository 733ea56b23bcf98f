"""Storages that leave and come back, under views that stay. "Away" is host memory, on the CPU too."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from prune_opd.config.memory_phases import Transition
from prune_opd.megatron.offload import StorageMover
from prune_opd.platform import Platform

MACHINE = Platform("cpu", torch.device("cpu"), "gloo")


def away(mover: StorageMover) -> None:
    mover(Transition("away", ("student",)))


def back(mover: StorageMover) -> None:
    mover(Transition("back", ("student",)))


def test_views_of_one_buffer_come_back_with_it_and_are_still_views() -> None:
    buffer = torch.arange(12.0)
    views = [buffer[:4].view(2, 2), buffer[4:]]
    before = [view.clone() for view in views]
    mover = StorageMover(lambda: views, MACHINE)
    away(mover)
    assert buffer.untyped_storage().nbytes() == 0
    back(mover)
    assert all(torch.equal(view, old) for view, old in zip(views, before, strict=True))
    buffer[0] = 7.0
    assert views[0][0, 0] == 7.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.int64])
def test_every_bit_comes_back(dtype: torch.dtype) -> None:
    bits = torch.randint(0, 255, (64,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    tensor = bits.clone().view(dtype)
    mover = StorageMover(lambda: [tensor], MACHINE)
    for _ in range(2):
        away(mover)
        back(mover)
    assert torch.equal(tensor.view(torch.uint8), bits)


def test_what_another_part_owns_stays() -> None:
    parameter, moment = torch.ones(4), torch.ones(8)
    mover = StorageMover(lambda: [parameter.view(2, 2), moment], MACHINE, except_of=lambda: [parameter])
    away(mover)
    assert parameter.untyped_storage().nbytes() == 16 and moment.untyped_storage().nbytes() == 0
    back(mover)
    assert moment.tolist() == [1.0] * 8


def test_tensors_are_asked_for_anew_and_leaving_twice_changes_nothing() -> None:
    state: list[Tensor] = []
    mover = StorageMover(lambda: state, MACHINE)
    away(mover)
    back(mover)
    state.append(torch.full((3,), 5.0))
    away(mover)
    away(mover)
    back(mover)
    assert state[0].tolist() == [5.0, 5.0, 5.0]


def test_host_buffers_are_made_once_and_go_with_their_tensors() -> None:
    state = [torch.ones(4), torch.ones(4)]
    mover = StorageMover(lambda: state, MACHINE)
    made = []
    pinned = mover._pinned
    mover._pinned = lambda storage: made.append(storage) or pinned(storage)  # type: ignore[method-assign, func-returns-value]
    for _ in range(3):
        away(mover)
        back(mover)
    assert len(made) == 2
    state.pop()
    away(mover)
    assert len(mover._host) == 1
    back(mover)
