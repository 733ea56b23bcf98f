"""What a rehearsal's mode of torch's dispatcher sees: live bytes, numbers that the host knows, reads, mixed devices."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from prune_opd.rehearse.ledger import WORK
from prune_opd.rehearse.traffic import Call, Traffic, disagreements
from prune_opd.rehearse.watch import Watch

KIB = 1024


def on_device(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def test_a_storage_counts_until_its_last_view_is_gone() -> None:
    with Watch() as watch:
        whole = on_device(256)
        view = whole[:2]
        assert watch.ledger.live == KIB
        del whole
        assert watch.ledger.live == KIB
        del view
        assert watch.ledger.live == 0


def test_what_autograd_keeps_is_alive_and_the_peak_remembers_it() -> None:
    with Watch() as watch:
        weight = on_device(256).requires_grad_()
        watch.ledger.label("student", [weight])
        watch.enter("train")
        loss = weight.exp().exp().sum()
        assert watch.ledger.by_part[WORK] >= 2 * KIB  # the results of both exponentials
        loss.backward()
        del loss
        assert watch.ledger.by_part[WORK] == KIB  # the gradient
    peak = watch.ledger.peaks["train"]
    assert peak.by_part["student"] == KIB and peak.work >= 3 * KIB


def test_a_part_that_leaves_the_device_is_no_longer_counted() -> None:
    with Watch() as watch:
        part = on_device(256)
        watch.ledger.label("optimizer", [part])
        part.untyped_storage().resize_(0)
        watch.ledger.resized(part.untyped_storage())
        assert watch.ledger.by_part["optimizer"] == 0


def test_numbers_from_the_host_are_known_through_small_operations() -> None:
    with Watch() as watch:
        bounds = torch.tensor([0, 3, 7]).to("meta")
        total = torch.zeros(3, device="meta")
        total[2] = bounds[-1]
        assert bounds.diff().tolist() == [3, 4]
        assert total[2].item() == 7
        total += on_device(3)  # nobody knows
        assert total.tolist() == [1, 1, 1]
    assert sum(watch.found.reads.values()) == 3


def test_a_read_is_noted_with_its_phase_and_place() -> None:
    with Watch() as watch:
        watch.enter("train")
        bool(on_device(1))
        on_device(4, dtype=torch.bool).nonzero()
        on_device(4)[on_device(4, dtype=torch.bool)]
    assert [(phase, how) for phase, how, _ in watch.found.reads] == [
        ("train", "item"),
        ("train", "nonzero"),
        ("train", "index by a mask"),
    ]
    assert {place.file for _, _, place in watch.found.reads} == {"test_watch.py"}


@pytest.mark.parametrize("product", [torch.mm, torch.add])
def test_an_operation_between_host_and_device_is_noted(product: object) -> None:
    with Watch() as watch:
        result = product(on_device(3, 3), torch.ones(3, 3))  # type: ignore[operator]
        assert result.is_meta
        on_device(3) + torch.ones(())  # a GPU takes single numbers of the host
        on_device(3)[torch.tensor([0, 1])]  # and its indices
    assert sum(watch.found.wrong_device.values()) == 1


@pytest.fixture
def group_of_four() -> Iterator[None]:
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=4)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("group_of_four")
def test_a_collective_that_torch_has_no_kernel_for_is_named() -> None:
    with Watch() as watch:
        watch.enter("train")
        dist.all_reduce(on_device(3))
        assert not watch.found.missing
        dist.all_reduce_coalesced([on_device(3)])
    ((phase, what, _), count) = next(iter(watch.found.missing.items()))
    assert (phase, what, count) == ("train", "allreduce_coalesced_", 1)


@pytest.mark.usefixtures("group_of_four")
@pytest.mark.parametrize("numbers", [8, 7])
def test_coalesced_collectives_are_ours_and_their_sizes_must_fit(numbers: int) -> None:
    """As megatron-core's optimizer reduces and gathers its buckets."""

    def both() -> None:
        with dist._coalescing_manager(async_ops=True):
            dist.reduce_scatter_tensor(on_device(2), on_device(numbers))
        with dist._coalescing_manager(async_ops=True):
            dist.all_gather_into_tensor(on_device(numbers), on_device(2))

    with Watch() as watch:
        if numbers == 8:
            both()
        else:
            with pytest.raises(ValueError, match="4 ranks with 7 numbers"):
                both()
    assert not watch.found.missing


def test_ranks_that_do_not_meet_in_a_collective_are_named() -> None:
    one, other = Traffic(), Traffic()
    for traffic in (one, other):
        traffic.order[0, 1].append(Call("train", "all-reduce", 8))
    assert list(disagreements([(0, one), (1, other)])) == []
    one.order[0, 1].append(Call("train", "broadcast", 0))
    (said,) = disagreements([(0, one), (1, other)])
    assert "number 1 of the group of 2 ranks is broadcast on rank 0 and none on rank 1" in said
